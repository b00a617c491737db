"""A support desk's export as it comes: 400 tickets of six teams in a CSV file that nobody has cleaned.

It has what such files have: semicolons and a byte order mark (a spreadsheet's export), Windows line ends, quotes and
line breaks inside texts, a team spelt in three ways, tickets nobody has assigned, the same ticket sent twice, empty
subjects, one endless text, letters of other languages, and classes from 150 rows down to seven.
"""

from __future__ import annotations

import csv
import random
from pathlib import Path

__all__ = ["ROWS_OF", "UNASSIGNED", "write_tickets"]

#: Labelled rows of each team, 400 in all.
ROWS_OF = {"Billing": 150, "Shipping": 110, "Login": 70, "Returns": 45, "Outage": 18, "Press": 7}
#: Rows that nobody has given to a team, beside those.
UNASSIGNED = 6

_SUBJECTS = {
    "Billing": ["Invoice", "Charged twice", "Wrong amount", "Refund", "Payment failed", "Bill for March", "VAT number"],
    "Shipping": [
        "Where is my parcel",
        "Delivery",
        "Late package",
        "Tracking",
        "Wrong address",
        "Courier",
        "Damaged box",
    ],
    "Login": ["Cannot log in", "Password", "Account locked", "Two-factor code", "Reset link", "Sign-in error"],
    "Returns": ["Send it back", "Return label", "Wrong size", "Exchange", "Return not booked"],
    "Outage": ["Site down", "Error 500", "App does not load", "Nothing works"],
    "Press": ["Interview request", "Article about you", "Photos for our magazine"],
}
_MESSAGES = {
    "Billing": [
        "I was charged {n} euros twice for order {n}",
        "the invoice {n} shows the wrong amount",
        "please refund {n} euros",
        "my credit card payment for bill {n} was declined",
        "why is there a fee of {n} on my bill?",
        "you took money from my account after I cancelled",
        "I need the invoice for order {n} with our VAT number",
    ],
    "Shipping": [
        "my parcel {n} has not arrived",
        "tracking number {n} has not moved for days",
        "the courier left the box in the rain",
        "please deliver order {n} to another address",
        "the package came {n} days late",
        "half of the parcel is missing",
        "how long does shipping to Norway take?",
    ],
    "Login": [
        "I forgot my password and the reset link has expired",
        "my account is locked after {n} attempts",
        "the two-factor code never arrives on my phone",
        "I cannot sign in since the update",
        "the login page says my e-mail is unknown",
        "please change the e-mail address I log in with",
    ],
    "Returns": [
        "I want to return the shoes, they are size {n}",
        "where do I find the return label for order {n}?",
        "the jacket does not fit, can I exchange it?",
        "I sent item {n} back weeks ago and it is not booked",
        "how many days do I have to send something back?",
    ],
    "Outage": [
        "your site shows error 500 on every page",
        "the app does not load since {n} o'clock",
        "the whole shop is down again",
        "the server does not respond, nothing works",
    ],
    "Press": [
        "I write for a newspaper and would like to interview your founder",
        "we are preparing an article about your company",
        "could you send our magazine photos of the office?",
    ],
}
_GREETINGS = ["Hi, ", "Hello,\n", "", "URGENT!!! ", "Dear team,\n\n", "hey ", "Good morning; ", 'Re: "your mail" - ']
_ENDINGS = [
    "",
    " thanks",
    "\n\nBest,\nAnna",
    " :-(",
    " Grüße, Jürgen",
    " Please hurry!",
    " 谢谢",
    '\n-- \nSent from my "phone"',
]
_SPELLINGS = {"Billing": ["Billing", "billing", "Billing ", "Billing", "Billing"]}


def write_tickets(file: Path, seed: int = 11) -> Path:
    """Write the export to ``file`` and return it; equal seeds write equal bytes."""
    draw = random.Random(seed)
    rows = [_ticket(draw, team) for team, count in ROWS_OF.items() for _ in range(count)]
    rows[3]["Message"] = "the same again and again, " * 900  # a whole mail thread pasted in
    rows[40] = dict(rows[39])  # sent twice
    rows += [{**_ticket(draw, draw.choice(list(ROWS_OF))), "Team": ""} for _ in range(UNASSIGNED)]
    draw.shuffle(rows)
    with file.open("w", encoding="utf-8-sig", newline="") as opened:
        writer = csv.DictWriter(opened, ["Ticket", "Subject", "Message", "Team", "Created"], delimiter=";")
        writer.writeheader()
        for number, row in enumerate(rows, start=1):
            writer.writerow(
                {"Ticket": 1000 + number, "Created": f"2026-0{1 + number % 9}-{1 + number % 28:02d}", **row}
            )
    return file


def _ticket(draw: random.Random, team: str) -> dict[str, str]:
    subject = "" if draw.random() < 0.15 else draw.choice(_SUBJECTS[team])
    message = draw.choice(_MESSAGES[team]).format(n=draw.randint(2, 9999))
    label = draw.choice(_SPELLINGS.get(team, [team]))
    return {"Subject": subject, "Message": draw.choice(_GREETINGS) + message + draw.choice(_ENDINGS), "Team": label}
