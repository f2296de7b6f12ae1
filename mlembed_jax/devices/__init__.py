"""What chips, their links and their compilers can do."""
