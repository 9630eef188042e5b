"""Prompts of random words: nobody else's text, and no two share a block."""

import random
from collections.abc import Sequence

_TEXT = """
about above across after again against air all almost along also always among and animal another answer any around ask
away back because before began being below best better between big black blue body book both bring brought build but
call came can car care carry change children city close cold come could country course cut dark day did different does
dog done door down draw drive during each early earth east eat end enough even ever every example eye face fact fall
family far farm fast father feel feet few field find fire first fish five fly follow food for form found four free
friend from front full game gave get girl give gold good got great green ground group grow had half hand hard has have
head hear heard heat help here high him his hold home horse hot hour house how hundred idea into island just keep kind
king knew know land large last late later laugh lay lead learn leave left less let letter life light like line list
little live long look made main make man many map mark may mean measure men might mile mind minute miss money moon
more morning most mother mountain move much music must name near need never new next night north note nothing notice
now number object off often old once one only open order other our out over own page paper part pass pattern people
perhaps person picture piece place plain plan plant play point power press problem product pull put question quick
rain ran reach read ready real red remember rest right river road rock room round rule run said same saw say school
science sea second see seem self sentence serve set several shall she ship short should show side simple since sing
sit six size sleep slow small snow some song soon sound south space special spell stand star start state stay step
still stood stop story street strong study such sun sure surface system table take talk teach tell ten test than that
the their them then there these they thing think this those though thought thousand three through time together told
too took top toward town travel tree true try turn two under unit until upon use usual very voice vowel wait walk want
war warm was watch water way week well went were west what wheel when where which while white who whole why will wind
with without wood word work world would write year yes yet you young your
"""
COMMON = tuple(_TEXT.split())
"""Common English words, most of them one token in most vocabularies."""


class Words:
    """Makes texts of random words from `vocabulary`. Different texts share at most a few words by chance."""

    def __init__(self, source: random.Random, vocabulary: Sequence[str] = COMMON, tokens_each: float = 1.0) -> None:
        self._source, self._vocabulary = source, vocabulary
        self.tokens_each = tokens_each
        """Average tokens per word; depends on the model, so measure it."""

    def text(self, tokens: int) -> str:
        """Return a text of about `tokens` tokens, at least one word."""
        return " ".join(self._source.choices(self._vocabulary, k=max(1, round(tokens / self.tokens_each))))
