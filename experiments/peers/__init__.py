"""What the library is compared with: the course's network and loops in PyTorch."""
