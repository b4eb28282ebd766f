"""What tests share: a service and its users, private servers, proxies, and the reaper of what is left."""
