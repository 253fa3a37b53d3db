"""One experiment: its parts built in order, the linear probe alongside it, and what it writes for people to look at."""
