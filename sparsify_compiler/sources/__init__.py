"""What a MODEL or DATA reference names: read into modules, programs, files and batches."""
