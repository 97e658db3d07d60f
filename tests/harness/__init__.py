"""What the tests start and share: our processes, real servers, packages made for the purpose."""
