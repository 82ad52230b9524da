"""Serve every room: processes, network, device memory, files."""
