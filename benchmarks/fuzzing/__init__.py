"""What a peer or a file may hold that nobody meant: mutations of frames, configurations and files, each by its seed.

One seed is one input, the same on every machine, so that whatever a long run of ``fuzz.py`` finds can be tried again by
its number, and so that the tests try the first of them in every run.

| module | inputs |
|---|---|
| :mod:`.frames` | random bytes; frames of every record with other bytes and fields, mostly rightly summed |
| :mod:`.configurations` | texts of shipped files with other values, lines and characters; overrides; bombs |
| :mod:`.files` | checkpoints and h5 files with bytes overwritten, cut, moved and repeated; facts of odd values |

Each ``try_...`` uses an input as the package would and names the outcome. An error that is not the package's own
escapes from it.
"""
