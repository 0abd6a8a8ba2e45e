"""The course's network and loops in PyTorch, which the library is compared with."""
