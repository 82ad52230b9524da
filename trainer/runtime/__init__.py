"""What every room stands on: processes, network, device memory, files."""
