"""The project itself: imports, documents, requirements, and what a killed run leaves."""
