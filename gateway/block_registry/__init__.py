"""Who holds which blocks: the fleet's state with its block tables, key chains, and what engines report as delivered.

The seams are `tables.Tables`, where tables come from (a registry of another node would be one more), and
`fleet_state.FleetState`, what everybody above reads. May import token_ids.
"""
