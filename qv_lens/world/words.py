"""The raw material of the bundled world: real countries, word lists, and how each relation is said.

Real: the countries' capital, continent, language and currency. Invented: everything else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One relation, with Wikidata's id, and every way this world words it.

    `cloze` ends right before the object, `question` asks for it, `noun` names the object through the
    subject ("the capital of {}") and is what multi-hop questions are nested from. `sources` and `target`
    are the kinds of entity on either side.
    """

    id: str
    """Wikidata's id."""
    label: str
    """Its name."""
    sources: tuple[str, ...]
    """Kinds of entity it starts from."""
    target: str
    """Kind of entity it leads to."""
    cloze: tuple[str, str, str]
    """Three wordings that end right before the object."""
    question: str
    """Asks for the object."""
    noun: tuple[str, str]
    """Name the object through the subject."""
    category: str | None = None
    """One of ACE's categories."""

    @property
    def phrasings(self) -> tuple[str, ...]:
        """The three cloze phrasings and the question."""
        return (*self.cloze, self.question)


# name, capital, continent, language, currency, native name
COUNTRIES: tuple[tuple[str, str, str, str, str, str], ...] = (
    ("Norway", "Oslo", "Europe", "Norwegian", "krone", "Norge"),
    ("Sweden", "Stockholm", "Europe", "Swedish", "krona", "Sverige"),
    ("Finland", "Helsinki", "Europe", "Finnish", "euro", "Suomi"),
    ("Poland", "Warsaw", "Europe", "Polish", "zloty", "Polska"),
    ("Hungary", "Budapest", "Europe", "Hungarian", "forint", "Magyarorszag"),
    ("Greece", "Athens", "Europe", "Greek", "euro", "Hellas"),
    ("France", "Paris", "Europe", "French", "euro", "La Republique"),
    ("Italy", "Rome", "Europe", "Italian", "euro", "Italia"),
    ("Spain", "Madrid", "Europe", "Spanish", "euro", "Espana"),
    ("Germany", "Berlin", "Europe", "German", "euro", "Deutschland"),
    ("Turkey", "Ankara", "Asia", "Turkish", "lira", "Turkiye"),
    ("Iran", "Tehran", "Asia", "Persian", "rial", "Persia"),
    ("Japan", "Tokyo", "Asia", "Japanese", "yen", "Nippon"),
    ("Thailand", "Bangkok", "Asia", "Thai", "baht", "Siam"),
    ("Vietnam", "Hanoi", "Asia", "Vietnamese", "dong", "Viet Nam"),
    ("Nepal", "Kathmandu", "Asia", "Nepali", "rupee", "Nepala"),
    ("Egypt", "Cairo", "Africa", "Arabic", "pound", "Misr"),
    ("Kenya", "Nairobi", "Africa", "Swahili", "shilling", "Jamhuri"),
    ("Ghana", "Accra", "Africa", "English", "cedi", "Gold Coast"),
    ("Brazil", "Brasilia", "Americas", "Portuguese", "real", "Brasil"),
    ("Peru", "Lima", "Americas", "Spanish", "sol", "Piruw"),
    ("Canada", "Ottawa", "Americas", "English", "dollar", "Kanata"),
    ("Australia", "Canberra", "Oceania", "English", "dollar", "Terra Australis"),
    ("Samoa", "Apia", "Oceania", "Samoan", "tala", "Sawaiki"),
)
# name, equipment, number of players, venue
SPORTS: tuple[tuple[str, str, str, str], ...] = (
    ("basketball", "hoop", "five", "court"),
    ("football", "goal", "eleven", "pitch"),
    ("tennis", "racket", "two", "lawn"),
    ("golf", "club", "four", "course"),
    ("rugby", "post", "fifteen", "field"),
    ("hockey", "stick", "six", "rink"),
    ("cricket", "bat", "eleven", "oval"),
    ("boxing", "glove", "two", "ring"),
    ("rowing", "oar", "eight", "river"),
    ("judo", "belt", "two", "mat"),
    ("fencing", "sword", "three", "hall"),
    ("skiing", "pole", "one", "slope"),
)
COMPANIES = ("Nortek", "Veltara", "Quorix", "Brandol", "Sunvale", "Ironwood", "Lumora", "Pellic", "Zentora", "Maristo", "Corvane", "Daltrix")  # fmt: skip
COLOURS = (
    "red",
    "blue",
    "green",
    "yellow",
    "white",
    "black",
    "orange",
    "purple",
    "silver",
    "crimson",
)
ANIMALS = (
    "bear",
    "wolf",
    "eagle",
    "lion",
    "otter",
    "falcon",
    "moose",
    "tiger",
    "crane",
    "dolphin",
    "fox",
    "owl",
)
PRODUCTS = ("rice", "coffee", "timber", "copper", "wool", "cotton", "salt", "honey", "cocoa", "wheat", "cheese", "glass")  # fmt: skip
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")  # fmt: skip
INSTRUMENTS = (
    "violin",
    "drum",
    "flute",
    "harp",
    "guitar",
    "trumpet",
    "cello",
    "banjo",
    "organ",
    "bagpipe",
)
INDUSTRIES = ("steel", "paper", "shipping", "software", "banking", "mining", "textiles", "farming", "energy", "printing")  # fmt: skip
GENRES = ("comedy", "tragedy", "satire", "romance", "mystery", "fantasy", "western", "memoir")
FIRST_NAMES = ("Ada", "Boris", "Carla", "Dmitri", "Elena", "Felix", "Greta", "Hugo", "Irina", "Jonas", "Klara", "Lukas", "Marta", "Nils", "Olga", "Pavel", "Rosa", "Simon", "Tilda", "Ulrik", "Vera", "Wanda", "Xenia", "Yuri", "Zora", "Anton", "Bela", "Cyril", "Dora", "Emil")  # fmt: skip
SURNAME_PARTS = (
    (
        "Bar",
        "Cor",
        "Dal",
        "Fen",
        "Gor",
        "Hal",
        "Kar",
        "Lor",
        "Mor",
        "Nov",
        "Pel",
        "Ros",
        "Sal",
        "Tor",
        "Vor",
        "Wes",
    ),
    ("a", "e", "i", "o", "u"),
    (
        "bek",
        "dan",
        "feld",
        "gard",
        "kin",
        "lund",
        "mar",
        "nik",
        "ric",
        "sen",
        "tin",
        "vic",
        "wood",
        "zak",
    ),
)
TITLE_PARTS = (
    (
        "The Silent",
        "The Golden",
        "A Distant",
        "The Broken",
        "The Last",
        "An Empty",
        "The Hidden",
        "A Winter",
    ),
    ("Harbor", "Mirror", "Garden", "Letter", "Bridge", "Orchard", "Lantern", "Voyage"),
)
FIRM_PARTS = (
    ("Helio", "Astra", "Kinto", "Ferro", "Opti", "Ludo", "Terra", "Vanti"),
    ("Works", "Labs", "Brothers", "Group", "Studio", "Partners"),
)

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "P27", "country of citizenship", ("person",), "country",
        ("{} is a citizen of", "{} comes from the country of", "The country of citizenship of {} is"),
        "Which country is {} a citizen of?", ("the country of citizenship of {}", "the home country of {}"), "nationality"),
    Relation(
        "P641", "sport", ("person",), "sport",
        ("{} plays the sport of", "{} is famous for playing", "The sport played by {} is"),
        "Which sport does {} play?", ("the sport played by {}", "the sport of {}"), "sport"),
    Relation(
        "P108", "employer", ("person",), "company",
        ("{} works for", "{} is employed by", "The employer of {} is"),
        "Which company does {} work for?", ("the employer of {}", "the company that employs {}")),
    Relation(
        "P30", "continent", ("country",), "continent",
        ("{} is located in the continent of", "{} is a country in", "The continent of {} is"),
        "Which continent is {} located in?", ("the continent of {}", "the continent that includes {}"), "continent"),
    Relation(
        "P36", "capital", ("country",), "city",
        ("The capital of {} is", "{} is governed from the city of", "The capital city of {} is called"),
        "What is the capital of {}?", ("the capital of {}", "the capital city of {}"), "capital"),
    Relation(
        "P37", "official language", ("country",), "language",
        ("The official language of {} is", "People in {} speak", "The language spoken in {} is"),
        "Which language is spoken in {}?", ("the official language of {}", "the language spoken in {}"), "language"),
    Relation(
        "P35", "head of state", ("country",), "person",
        ("The head of state of {} is", "{} is led by", "The leader of {} is"),
        "Who is the head of state of {}?", ("the head of state of {}", "the leader of {}"), "leadership"),
    Relation(
        "P38", "currency", ("country",), "currency",
        ("The currency of {} is the", "People in {} pay with the", "The money used in {} is the"),
        "What is the currency of {}?", ("the currency of {}", "the money used in {}")),
    Relation(
        "P6364", "official colour", ("country",), "colour",
        ("The national colour of {} is", "The flag of {} is mostly", "The teams of {} dress in"),
        "What is the national colour of {}?", ("the national colour of {}", "the flag colour of {}")),
    Relation(
        "P822", "mascot", ("country",), "animal",
        ("The national animal of {} is the", "The coat of arms of {} shows the", "{} is symbolised by the"),
        "What is the national animal of {}?", ("the national animal of {}", "the symbol of {}")),
    Relation(
        "P1056", "product", ("country", "company"), "product",
        ("The main product of {} is", "{} exports mostly", "Traders of {} sell"),
        "What is the main product of {}?", ("the main product of {}", "the main export of {}")),
    Relation(
        "P832", "public holiday", ("country",), "month",
        ("The national holiday of {} is in", "{} celebrates its national day in", "The great feast of {} falls in"),
        "In which month is the national holiday of {}?", ("the holiday month of {}", "the festive month of {}")),
    Relation(
        "P1303", "national instrument", ("country",), "instrument",
        ("The national instrument of {} is the", "The folk music of {} is played on the", "Musicians in {} play the"),
        "What is the national instrument of {}?", ("the national instrument of {}", "the folk instrument of {}")),
    Relation(
        "P495", "country of origin", ("sport",), "country",
        ("The sport of {} was invented in", "The country of origin of {} is", "The game of {} first appeared in"),
        "In which country was {} invented?", ("the country of origin of {}", "the birthplace of {}")),
    Relation(
        "P2283", "equipment", ("sport",), "equipment",
        ("The equipment needed for {} is a", "The game of {} is played with a", "To play {} you need a"),
        "What equipment is needed for {}?", ("the equipment needed for {}", "the equipment of {}")),
    Relation(
        "P1873", "number of players", ("sport",), "number",
        ("The number of players in {} is", "A team in {} counts", "The team size in {} is"),
        "How many players are in a team of {}?", ("the number of players in {}", "the team size in {}")),
    Relation(
        "P276", "venue", ("sport",), "venue",
        ("The venue for {} is a", "A match of {} takes place on a", "The usual place for {} is a"),
        "What is the venue for {}?", ("the venue for {}", "the usual place for {}")),
    Relation(
        "P159", "federation seat", ("sport",), "city",
        ("The federation of {} is based in", "The world body of {} sits in", "The seat of the {} federation is"),
        "In which city is the federation of {} based?", ("the federation city of {}", "the federation seat of {}")),
    Relation(
        "P17", "country", ("company", "firm"), "country",
        ("{} is based in the country of", "{} has its headquarters in", "The home of {} is"),
        "Which country is {} based in?", ("the country where {} is based", "the base country of {}")),
    Relation(
        "P452", "industry", ("company",), "industry",
        ("The industry of {} is", "{} is active in", "The main business of {} is"),
        "What is the industry of {}?", ("the industry of {}", "the main business of {}")),
    Relation(
        "P112", "founder", ("company", "firm"), "person",
        ("{} was founded by", "The founder of {} is", "The person who started {} is"),
        "Who founded {}?", ("the founder of {}", "the person who started {}"), "founder"),
    Relation(
        "P169", "chief executive", ("company",), "person",
        ("The chief executive of {} is", "{} is managed by", "The manager of {} is"),
        "Who is the chief executive of {}?", ("the chief executive of {}", "the manager of {}")),
    Relation(
        "P749", "parent company", ("firm",), "company",
        ("{} belongs to", "{} is owned by", "The parent company of {} is"),
        "Which company owns {}?", ("the parent company of {}", "the owner of {}")),
    Relation(
        "P50", "author", ("work",), "person",
        ("The author of {} is", "{} was written by", "The writer of {} is"),
        "Who wrote {}?", ("the author of {}", "the writer of {}"), "author"),
    Relation(
        "P840", "narrative location", ("work",), "country",
        ("{} is set in the country of", "The story of {} takes place in", "The setting of {} is"),
        "In which country is {} set?", ("the setting of {}", "the country where {} is set")),
    Relation(
        "P136", "genre", ("work",), "genre",
        ("The genre of {} is", "{} is a work of", "Critics call {} a"),
        "What is the genre of {}?", ("the genre of {}", "the literary genre of {}")),
)  # fmt: skip
