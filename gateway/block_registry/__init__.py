"""Who holds which blocks: the fleet's state with its block tables, key chains, and what engines report as delivered.

The seams are `tables.Tables`, where tables come from, and `fleet_state.FleetState`, what everybody above reads. May import
token_ids.
"""
