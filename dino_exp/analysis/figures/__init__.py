"""What each picture shows, one module a kind."""
