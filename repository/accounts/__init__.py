"""Accounts: users, sessions, one-time tokens, queued mails and the audit trail."""
