"""Accounts, sign-in, sessions, emails and pictures."""
