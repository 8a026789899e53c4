"""Write the facts that come with weightpatch, in CounterFact's JSON format: ``python scripts/facts.py``.

The lists are general knowledge, written by hand. Of each answer's subjects the last three are never edited: they are
the neighbours, whose answer stays. The others are edited, each once in the whole file, to another answer of the same
relation, which is drawn with a fixed seed and false on purpose. Facts are shuffled, so that a part of the file has all
relations.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from weightpatch.tasks.language import CounterFact, Fact, Question, write

FILE = Path(__file__).parents[1] / "src/weightpatch/tasks/language/shipped/facts.json"
SEED, NEIGHBOURS = 0, 3


@dataclass(frozen=True)
class Relation:
    """Prompts with {} for the subject: one to edit, two that ask the same, one to continue; and subjects by answer."""

    id: str  # of the property in Wikidata
    prompt: str
    paraphrases: tuple[str, str]
    generation: str
    subjects: dict[str, str]


RELATIONS = (
    Relation(
        "P17",
        "{} is a city in the country of",
        ("The city of {} lies in the country of", "Whoever visits {} is in the country of"),
        "{} is a city that is known for",
        {
            "France": "Lyon, Marseille, Toulouse, Nantes, Bordeaux, Strasbourg",
            "Germany": "Munich, Hamburg, Cologne, Dresden, Stuttgart, Leipzig",
            "Italy": "Milan, Naples, Turin, Florence, Bologna, Venice",
            "Spain": "Seville, Bilbao, Barcelona, Zaragoza, Malaga, Madrid",
            "Japan": "Osaka, Kyoto, Nagoya, Sapporo, Kobe, Yokohama",
            "India": "Mumbai, Chennai, Kolkata, Jaipur, Pune, Bangalore",
            "Canada": "Toronto, Montreal, Calgary, Winnipeg, Edmonton, Ottawa",
            "Australia": "Sydney, Brisbane, Adelaide, Canberra, Melbourne",
            "Brazil": "Recife, Curitiba, Fortaleza, Manaus, Rio de Janeiro",
            "Poland": "Krakow, Gdansk, Poznan, Wroclaw, Warsaw",
            "Turkey": "Istanbul, Izmir, Bursa, Antalya, Ankara",
            "Egypt": "Alexandria, Luxor, Aswan, Giza, Cairo",
        },
    ),
    Relation(
        "P30",
        "{} is a country on the continent of",
        ("The country of {} belongs to the continent of", "On the map, {} is found on the continent of"),
        "{} is a country in which",
        {
            "Africa": "Nigeria, Kenya, Ghana, Ethiopia, Zambia, Uganda, Morocco",
            "Asia": "Thailand, Vietnam, Nepal, Mongolia, Cambodia, Laos",
            "Europe": "Sweden, Norway, Greece, Hungary, Finland, Denmark, Portugal",
            "South America": "Bolivia, Ecuador, Uruguay, Paraguay, Peru, Chile",
        },
    ),
    Relation(
        "P37",
        "The official language of {} is",
        ("In {}, laws are written in", "The state language of {} is called"),
        "In {}, people speak",
        {
            "Spanish": "Mexico, Argentina, Colombia, Cuba, Venezuela, Honduras",
            "Portuguese": "Mozambique, Angola, Brazil, Portugal, Cape Verde",
            "Arabic": "Saudi Arabia, Jordan, Kuwait, Oman, Qatar, Egypt",
            "French": "Senegal, Gabon, Monaco, Togo, France",
        },
    ),
    Relation(
        "P101",
        "{} is known for work in the field of",
        ("The discipline of {} was", "The research of {} was mainly about"),
        "{} is remembered for",
        {
            "physics": "Niels Bohr, Max Planck, Enrico Fermi, Paul Dirac, Richard Feynman, Albert Einstein",
            "chemistry": "Dmitri Mendeleev, Antoine Lavoisier, Robert Bunsen, John Dalton, Linus Pauling",
            "mathematics": "Leonhard Euler, Bernhard Riemann, David Hilbert, Emmy Noether, Carl Friedrich Gauss",
            "psychology": "Carl Jung, Jean Piaget, Alfred Adler, Abraham Maslow, Sigmund Freud",
            "economics": "David Ricardo, Milton Friedman, Friedrich Hayek, John Maynard Keynes, Adam Smith",
        },
    ),
    Relation(
        "P103",
        "The native language of {} was",
        ("The mother tongue of {} was", "As a child, {} learned to speak"),
        "{} was a writer whose",
        {
            "French": "Victor Hugo, Jules Verne, Marcel Proust, Voltaire, Emile Zola",
            "German": "Friedrich Schiller, Immanuel Kant, Bertolt Brecht, Thomas Mann, Johann Wolfgang von Goethe",
            "Russian": "Anton Chekhov, Alexander Pushkin, Ivan Turgenev, Fyodor Dostoevsky, Leo Tolstoy",
            "Spanish": "Pablo Neruda, Octavio Paz, Federico Garcia Lorca, Gabriel Garcia Marquez, Miguel de Cervantes",
            "Italian": "Niccolo Machiavelli, Umberto Eco, Italo Calvino, Giovanni Boccaccio, Dante Alighieri",
        },
    ),
    Relation(
        "P1303",
        "{} was a master of the",
        ("On stage, {} played the", "The instrument of {} was the"),
        "{} gave concerts in which",
        {
            "guitar": "Jimi Hendrix, Django Reinhardt, Chuck Berry, Andres Segovia, Eric Clapton",
            "piano": "Franz Liszt, Glenn Gould, Vladimir Horowitz, Arthur Rubinstein, Frederic Chopin",
            "violin": "Yehudi Menuhin, Jascha Heifetz, David Oistrakh, Itzhak Perlman, Niccolo Paganini",
            "trumpet": "Dizzy Gillespie, Chet Baker, Wynton Marsalis, Miles Davis, Louis Armstrong",
        },
    ),
    Relation(
        "P176",
        "The {} is a product of the company",
        ("The company that makes the {} is", "The {} was developed by"),
        "The {} was sold",
        {
            "Apple": "iPad, iPod, MacBook, iMac, iPhone",
            "Nintendo": "Game Boy, GameCube, Wii, Game Boy Advance, Famicom",
            "Sony": "Walkman, PlayStation 2, PlayStation 3, PlayStation Portable, PlayStation",
            "Toyota": "Prius, Camry, Hilux, Land Cruiser, Corolla",
            "Ford": "Mustang, Fiesta, Bronco, Model A, Model T",
            "Honda": "Civic, Accord, Odyssey minivan, CR-V",
            "Microsoft": "Xbox 360, Xbox One, Zune, Surface Pro, Xbox",
        },
    ),
    Relation(
        "P279",
        "The {} is a kind of",
        ("Biologists call the {} a", "In the animal kingdom, the {} counts as a"),
        "The {} lives",
        {
            "mammal": "dolphin, otter, bat, horse, whale, elephant",
            "bird": "sparrow, penguin, ostrich, owl, pigeon, eagle",
            "reptile": "gecko, iguana, tortoise, crocodile, python",
            "fish": "herring, carp, cod, trout, tuna, salmon",
            "insect": "dragonfly, grasshopper, beetle, mosquito, butterfly",
        },
    ),
    Relation(
        "P31",
        "At room temperature, {} is a",
        ("Chemists say that the element {} is a", "Kept in a warm room, {} will be a"),
        "The element {} is used",
        {
            "metal": "copper, zinc, nickel, tin, silver, iron",
            "gas": "nitrogen, neon, argon, helium, oxygen, hydrogen",
        },
    ),
    Relation(
        "P495",
        "{} is a company from the country of",
        ("The firm {} was founded in the country of", "The headquarters of {} are in the country of"),
        "{} is a company that",
        {
            "Japan": "Nissan, Panasonic, Canon, Mitsubishi, Subaru",
            "Germany": "Siemens, Bosch, Adidas, Porsche, Volkswagen",
            "Sweden": "Scania, Ericsson, Electrolux, Volvo, Spotify",
            "South Korea": "Hyundai, Kia, Samsung, LG Electronics, SK Hynix",
        },
    ),
)


def facts() -> list[Fact]:
    """Return all facts, in the order of the file."""
    draw, found = random.Random(SEED), list[Fact]()
    for relation in RELATIONS:
        for true, names in relation.subjects.items():
            subjects = names.split(", ")
            edited, others = subjects[:-NEIGHBOURS], subjects[-NEIGHBOURS:]
            for subject in edited:
                target = draw.choice([answer for answer in relation.subjects if answer != true])
                found.append(made(relation, subject, true, target, others))
    draw.shuffle(found)
    return [numbered(fact, number) for number, fact in enumerate(found)]


def made(relation: Relation, subject: str, true: str, target: str, others: list[str]) -> Fact:
    return Fact(
        relation.prompt.format(subject),
        target,
        subject,
        (true,),
        tuple(prompt.format(subject) for prompt in relation.paraphrases),
        tuple(Question(relation.prompt.format(other), (true,)) for other in others),
        generation=(relation.generation.format(subject),),
        source="CounterFact",
        rest={"requested_rewrite": {"relation_id": relation.id}},
    )


def numbered(fact: Fact, number: int) -> Fact:
    return Fact(**{**vars(fact), "id": number})


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    write(facts(), FILE, CounterFact())
    print(f"{FILE.name}: {len(facts())} facts, {FILE.stat().st_size} bytes")
