"""Registration, sign-in, users, profiles, avatars, administration."""
