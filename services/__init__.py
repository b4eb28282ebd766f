"""Services that several edges share: authentication, tokens, passwords, rate limits and pictures."""
