"""Movies, characters, jobs, and the conventions of the REST API."""
