"""Programs that write generated files, audit the packages and test clients."""
