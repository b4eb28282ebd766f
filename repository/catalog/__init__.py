"""What the catalog finds beyond lists: similar movies."""
