"""What tests share: a service and its users, private servers, proxies, and the clean-up after killed runs."""
