"""What users say about movies: comments, ratings and watchlists."""
