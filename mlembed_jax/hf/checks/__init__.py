"""What each program would make of an exported folder."""
