"""Memory that could still be written is not given out again."""

from dataclasses import dataclass

from transport.node.staging import Staging


@dataclass
class Transfer:
    over: bool = False


def test_pieces_do_not_overlap_and_come_back() -> None:
    staging = Staging(4096)
    first, second = staging.take(2, 1024), staging.take(4, 1024)
    assert first is not None
    assert second is not None
    assert (first.begin, first.end, second.begin, second.end) == (0, 2048, 2048, 4096)
    assert staging.take(1, 1) is None
    staging.give_back(first)
    assert staging.taken_bytes() == 2048
    assert staging.take(2, 1024) is not None


def test_a_piece_that_something_may_write_stays_out_of_use_until_that_is_over() -> None:
    staging = Staging(4096)
    piece = staging.take(4, 1024)
    assert piece is not None
    late, done = Transfer(), Transfer(over=True)
    piece.part(1, 3).writing.extend([done, late])  # what writes a part writes the piece
    staging.give_back(piece)
    assert staging.taken_bytes() == 4096
    assert staging.take(1, 1024) is None
    late.over = True
    assert staging.taken_bytes() == 0
    assert staging.take(4, 1024) is not None


def test_a_part_of_a_piece_is_its_slots() -> None:
    staging = Staging(4096)
    staging.take(1, 1000)
    piece = staging.take(3, 1000)
    assert piece is not None
    part = piece.part(1, 3)
    part.rows[:] = 7
    assert (part.begin, part.end) == (piece.begin + 1000, piece.begin + 3000)
    assert not piece.rows[0].any()
    assert (piece.rows[1:] == 7).all()
