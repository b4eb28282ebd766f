"""Services that several edges share: authentication, tokens, passwords, bulk operations, the first admin."""
