"""Operations for registration, sign-in, users, profiles, avatars and administration."""
