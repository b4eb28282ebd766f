"""Operations for what users say about movies: comments, ratings and watchlists."""
