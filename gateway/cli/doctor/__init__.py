"""`peerkv doctor`: collects facts about a machine (machine, peers, links), judges them (findings), prints them (report)."""
