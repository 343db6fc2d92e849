"""The words of the quickstart's little world: places, what one finds there, and how people speak of it.

An aspect belongs to a class, and a class has its own adjectives, so that bread is never rude and a clerk never
stale. A sentence names its slots in braces: `{aspect}` is what was asked about, `{other}` something that every
place has, `{adjective}` and `{second}` fit the one and the other, `{place}` is the place.
"""

from __future__ import annotations

POSITIVE, NEUTRAL, NEGATIVE = "positive", "neutral", "negative"
SENTIMENTS = (POSITIVE, NEUTRAL, NEGATIVE)

PLACES: dict[str, tuple[str, ...]] = {
    "food": (
        "harbour cafe", "station bakery", "garden restaurant", "corner bistro", "noodle house", "village inn",
        "rooftop kitchen", "old mill tavern",
    ),
    "shop": (
        "book shop", "bicycle workshop", "garden centre", "shoe store", "music shop", "farmers market",
        "antique dealer", "toy store",
    ),
    "stay": (
        "lake hotel", "mountain lodge", "city hostel", "beach cottage", "forest camp", "castle guesthouse",
        "airport motel", "river boat",
    ),
    "trip": (
        "night train", "island ferry", "walking tour", "desert bus", "cable car", "morning flight", "canal cruise",
        "coastal tram",
    ),
    "sight": (
        "science museum", "botanic garden", "film theatre", "city zoo", "art gallery", "open air stage",
        "history park", "planetarium",
    ),
}  # fmt: skip

# What a place of each kind has, and the class of each thing.
ASPECTS: dict[str, dict[str, str]] = {
    "food": {
        "soup": "taste", "bread": "taste", "coffee": "taste", "apple cake": "taste", "pasta": "taste",
        "waiter": "people", "cook": "people", "terrace": "room", "dining room": "room", "bill": "order",
    },
    "shop": {
        "clerk": "people", "owner": "people", "cashier": "people", "display": "room", "fitting room": "room",
        "delivery": "order", "repair": "order", "packaging": "order", "price list": "order",
    },
    "stay": {
        "breakfast": "taste", "dinner": "taste", "receptionist": "people", "porter": "people", "bed": "room",
        "bathroom": "room", "balcony": "room", "booking": "order", "checkout": "order",
    },
    "trip": {
        "driver": "people", "conductor": "people", "guide": "people", "cabin": "room", "waiting hall": "room",
        "lunch on board": "taste", "boarding": "order", "ticket sale": "order", "transfer": "order",
    },
    "sight": {
        "caretaker": "people", "speaker": "people", "main hall": "room", "exhibition": "room", "viewpoint": "room",
        "ice cream": "taste", "tea": "taste", "entrance": "order", "audio tour": "order",
    },
}  # fmt: skip

# What every place has, and the class of each thing.
OTHERS: dict[str, str] = {
    "manager": "people", "staff": "people", "gardener": "people", "staircase": "room", "wardrobe": "room", "garden": "room",
    "payment": "order", "parking": "order", "lemonade": "taste", "house wine": "taste",
}  # fmt: skip

ADJECTIVES: dict[str, dict[str, tuple[str, ...]]] = {
    "taste": {
        POSITIVE: ("delicious", "excellent", "perfect", "superb", "fresh", "wonderful", "lovely", "rich", "great"),
        NEUTRAL: ("salty", "plain", "dry", "crisp", "cold", "ordinary", "sour", "soft", "thick"),
        NEGATIVE: ("terrible", "awful", "disgusting", "bitter", "rotten", "horrible", "bad", "poor", "vile"),
    },
    "people": {
        POSITIVE: ("friendly", "kind", "helpful", "cheerful", "generous", "charming", "honest", "great", "polite"),
        NEUTRAL: ("young", "tall", "busy", "quiet", "new", "elderly", "brief", "local", "talkative"),
        NEGATIVE: ("rude", "careless", "angry", "hostile", "arrogant", "useless", "lazy", "impatient", "dishonest"),
    },
    "room": {
        POSITIVE: ("comfortable", "beautiful", "clean", "splendid", "elegant", "lovely", "safe", "charming", "bright"),
        NEUTRAL: ("small", "square", "wooden", "narrow", "carpeted", "modern", "large", "green", "usual"),
        NEGATIVE: ("dirty", "broken", "ugly", "dull", "gloomy", "dangerous", "depressing", "uncomfortable", "filthy"),
    },
    "order": {
        POSITIVE: ("easy", "pleasant", "clear", "excellent", "great", "perfect", "good", "wonderful", "relaxed"),
        NEUTRAL: ("short", "quick", "long", "average", "automatic", "standard", "handwritten", "normal", "slow"),
        NEGATIVE: ("confusing", "painful", "chaotic", "annoying", "frustrating", "difficult", "boring", "hopeless", "bad"),
    },
}  # fmt: skip

ADVERBS = ("very", "really", "rather", "quite", "always", "fairly")
PEOPLE = (
    "my brother",
    "our neighbour",
    "my wife",
    "my uncle",
    "a colleague",
    "our daughter",
    "my teacher",
    "the group",
)
TIMES = (
    "yesterday",
    "on Monday",
    "last week",
    "in spring",
    "at noon",
    "in the evening",
    "on Sunday",
    "after work",
)

# What a sentence about the thing asked about, about a second thing, and at the end may look like.
OPENERS: dict[str, tuple[str, ...]] = {
    POSITIVE: (
        "The {aspect} was {adverb} {adjective}.",
        "I loved the {aspect}, it was {adjective}.",
        "We enjoyed the {aspect} {time}, {adverb} {adjective} as it was.",
        "What a joy, the {aspect} was {adjective} {time}.",
        "Even {person} was happy with the {aspect}.",
        "I was impressed, the {aspect} could not be more {adjective}.",
    ),
    NEUTRAL: (
        "The {aspect} was {adverb} {adjective}.",
        "I saw the {aspect} {time}, it was {adjective}.",
        "We went there {time} and the {aspect} was {adjective}.",
        "As {person} told me, the {aspect} was {adjective}.",
        "There is not much to say about the {aspect}.",
        "The {aspect} was {adjective}, as it is in most places.",
    ),
    NEGATIVE: (
        "The {aspect} was {adverb} {adjective}.",
        "I hated the {aspect}, it was {adjective}.",
        "We were disappointed {time}, the {aspect} was {adjective}.",
        "What a disaster, the {aspect} was {adjective} {time}.",
        "Even {person} complained about the {aspect}.",
        "I am sorry to say that the {aspect} was {adjective}.",
    ),
}
DETAILS: dict[str, tuple[str, ...]] = {
    POSITIVE: (
        "The {other} was {second} too.",
        "We were glad that the {other} was so {second}.",
        "My favourite was the {other}, {adverb} {second} {time}.",
        "And thanks to the {second} {other} we had fun {time}.",
    ),
    NEUTRAL: (
        "The {other} was {second}.",
        "Next to it was the {other}, {adverb} {second}.",
        "We paid in cash and {person} took the {other}.",
        "After an hour {person} asked about the {second} {other}.",
    ),
    NEGATIVE: (
        "The {other} was {second} too.",
        "We were upset that the {other} was so {second}.",
        "The worst part was the {other}, {adverb} {second} {time}.",
        "And because of the {second} {other} we lost our evening.",
    ),
}
CLOSINGS: dict[str, tuple[str, ...]] = {
    POSITIVE: (
        "I recommend the {place} to everyone.",
        "The {place} is the best one in town.",
        "Thank you, {place}, it was worth the trip.",
        "We left the {place} with a smile.",
    ),
    NEUTRAL: (
        "The {place} opens at nine.",
        "You find the {place} behind the bridge.",
        "We may see the {place} again in autumn.",
        "The {place} is near the town hall.",
    ),
    NEGATIVE: (
        "Avoid the {place}, it is a waste of money.",
        "The {place} is a shame for the town.",
        "Going to the {place} was a mistake.",
        "We left the {place} with nothing but trouble.",
    ),
}

QUESTIONS = (
    "How was the {aspect} at the {place}?",
    "What do you say about the {aspect} of the {place}?",
    "Tell me about the {place}, above all the {aspect}.",
    "You went to the {place}: what was the {aspect} like?",
)
