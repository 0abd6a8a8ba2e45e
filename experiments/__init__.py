"""Apps: flags in, files out. The only place that knows absl."""
