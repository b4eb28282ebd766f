"""Services that several edges share: authentication, tokens, passwords, the first admin."""
