"""Rate limits and lockout, in memory or shared through Redis."""
