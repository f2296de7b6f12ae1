"""From states to one number and its gradient: the terms over exits and dims. Arrays only."""
