"""Faults between two nodes, by the thousand: every block that is taken for good is compared with what it has to be."""
