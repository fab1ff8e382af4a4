"""What writes the files that are made from the code. Nothing here is part of the service."""
