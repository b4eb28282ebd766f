"""What users of other kinds of movie service do, each played as a story: a guide for those who move to Marquee."""
