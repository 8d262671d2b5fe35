"""What comes out of a study: exported configurations and the report."""
