"""Rate limits and lockout, in memory or shared through Redis, and limits for what is in progress."""
