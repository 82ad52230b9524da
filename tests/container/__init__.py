"""Check the Dockerfile and the Apptainer definition, and build the Dockerfile's CPU image."""
