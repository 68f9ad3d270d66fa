"""The words of rendered words, documents and charts, apart for training and for what is held out.

Whatever names something on a page (firms, people, goods, towns, titles) is in one of the two sets
alone, so that a model cannot know an answer of the evaluation without reading it.  Words that every
page of its kind has (`Total`, `Date`) are in the generators.  Easy to get wrong: lists are part of
the evaluation's fixed samples; a change of a held-out list is a new version of its tasks.
"""

from typing import Literal, NamedTuple

PageSplit = Literal["train", "held_out"]


class Theme(NamedTuple):
    """What a chart is about."""

    title: str
    measure: str
    """What is counted, as written on the axis."""
    noun: str
    """What a category is, a key of `Vocabulary.categories`."""


class Vocabulary(NamedTuple):
    """Lists of one split."""

    long_words: tuple[str, ...]
    stems: tuple[str, ...]
    first_names: tuple[str, ...]
    last_names: tuple[str, ...]
    towns: tuple[str, ...]
    streets: tuple[str, ...]
    goods: tuple[str, ...]
    departments: tuple[str, ...]
    occupations: tuple[str, ...]
    subjects: tuple[str, ...]
    sentences: tuple[str, ...]
    forms: tuple[str, ...]
    events: tuple[str, ...]
    venues: tuple[str, ...]
    series: tuple[str, ...]
    categories: dict[str, tuple[str, ...]]
    themes: tuple[Theme, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


_TRAIN = Vocabulary(
    long_words=_words(
        """
        remember hesitate together national research standard progress painting railroad mountain
        birthday hospital calendar children original sentence passport daughter material language
        industry exchange building platform customer discover elephant umbrella triangle physical
        possible personal position delivery internal football religion computer computers pictures
        beautiful different important community education knowledge president character yesterday
        chocolate dangerous vegetable newspaper telephone adventure favourite celebrate companies
        afternoon breakfast butterfly crocodile happiness introduce telescope furniture orchestra
        technology experience university government management population department individual
        generation restaurant photograph strawberry basketball helicopter understand microphone
        dictionary atmosphere background collection electronic foundation investment television
        information temperature performance development environment opportunity competition
        association instruction personality magnificent imagination measurement independent
        particularly organization relationship professional conversation neighborhood
        """
    ),
    stems=_words(
        """
        Harlow Pemberton Riverside Oakfield Summit Golden Atlas Bluebell Corner Silver Maple
        Northgate Phoenix Crown Meadow Union Central Anchor Garden Royal Lakeview Orchard Eagle
        Beacon
        """
    ),
    first_names=_words(
        """
        Anna Peter Maria John Laura David Emma Thomas Sarah Paul Julia Mark Helen Simon Nina Robert
        Clara Martin Lucy Daniel Rosa Victor Eva Frank
        """
    ),
    last_names=_words(
        """
        Smith Miller Brown Taylor Walker Hughes Parker Cooper Morgan Foster Bennett Reed Howard
        Price Russell Hayes Griffin Wallace Stone Burton Webb Lawson Barker Fisher
        """
    ),
    towns=_words(
        """
        Norwick Ashford Milton Kingsbury Redhill Eastbourne Longford Whitby Harwich Stanton Burnham
        Crawley Denton Elmswell Fairfield Grantham
        """
    ),
    streets=_words(
        "Mill Church Station Victoria Park High Bridge School Queen Chapel Green Albert Market York"
    ),
    goods=_lines(
        """
        Apples
        Brown bread
        Butter
        Orange juice
        Coffee beans
        Green tea
        Eggs
        Tomatoes
        Rice
        Cheddar
        Honey
        Pencils
        Notebook
        Light bulb
        Batteries
        Soap
        Shampoo
        Towels
        Chicken
        Bananas
        Pasta
        Olive oil
        Sugar
        Potatoes
        Paper cups
        Hammer
        Garden hose
        Candles
        """
    ),
    departments=_words("Sales Marketing Finance Research Support Transport Planning Design"),
    occupations=_words(
        "teacher nurse farmer engineer driver baker lawyer plumber writer dentist gardener pilot"
    ),
    subjects=_lines(
        """
        Change of address
        Your order of last week
        Repair of the roof
        New opening hours
        Payment of your invoice
        Annual meeting
        Delivery of chairs
        Your library card
        Insurance of the car
        Rent for the office
        """
    ),
    sentences=_lines(
        """
        Thank you for the message of last Monday.
        We have passed it on to our main office.
        You will receive an answer within ten days.
        Please keep a copy of this page.
        Our staff will be glad to help you.
        The work should be finished by spring.
        Kindly return the papers by post.
        There is nothing to pay at this time.
        The usual conditions remain the same.
        """
    ),
    forms=_lines(
        """
        Membership Form
        Visitor Registration
        Job Application
        Travel Request
        Library Card Form
        Room Booking
        Patient Record
        """
    ),
    events=_lines(
        """
        Summer Concert
        Book Sale
        Village Fair
        Chess Evening
        Flower Show
        Dance Class
        Charity Run
        Open Garden Day
        Photo Contest
        Winter Market
        """
    ),
    venues=_lines(
        """
        Town Hall
        City Library
        Sports Ground
        School Theatre
        Old Church
        Market Square
        Park Pavilion
        Museum Garden
        """
    ),
    series=_words("North South Men Women Morning Evening Apples Pears Plan Actual Buses Trains"),
    categories={
        "city": _words("Paris Rome Tokyo Cairo Lima Delhi Seoul Berlin Madrid London Sydney"),
        "person": _words("Anna Peter Maria John Laura David Emma Thomas Sarah Paul Julia Mark"),
        "fruit": _words("Apple Pear Plum Cherry Grape Lemon Orange Peach Mango"),
        "month": _words("Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec"),
        "year": tuple(str(year) for year in range(1990, 2008)),
    },
    themes=(
        Theme("Visitors by city", "visitors", "city"),
        Theme("Rain days by city", "days", "city"),
        Theme("Books read", "books", "person"),
        Theme("Goals scored", "goals", "person"),
        Theme("Fruit sold", "boxes", "fruit"),
        Theme("Harvest of fruit", "tons", "fruit"),
        Theme("Sales by month", "orders", "month"),
        Theme("New members by month", "members", "month"),
        Theme("Population by year", "thousands", "year"),
        Theme("Output by year", "tons", "year"),
    ),
)

_HELD_OUT = Vocabulary(
    long_words=_words(
        """
        keyboard sandwich treasure universe magazine airplane baseball strength medicine campaign
        champion dinosaur envelope festival graduate handsome identity judgment kangaroo landmark
        memories necklace operator pleasure question sunshine tropical vacation wireless
        astronaut boulevard cathedral detective equipment formation geography highlight invention
        lightning mechanism nightmare ourselves paragraph questions raspberry satellite territory
        ultimatum volunteer waterfall xylophone affection blueprint
        assistance brightness convention discipline enthusiasm friendship grapefruit historical
        incredible journalist laboratory motorcycle occupation playground refreshing settlement
        tournament underneath vegetarian watermelon
        achievement bibliography catastrophe destination examination fascinating grandmother
        hospitality intelligent legislation mathematics nationality observation partnership
        quarterback registration skyscraper thermometer unfortunate ventilation
        architecture constitution disagreement headquarters illustration manufacturer
        photographer refrigerator
        """
    ),
    stems=_words(
        """
        Wexley Brindle Juniper Foxglove Tidewater Copper Marlowe Zephyr Thistle Larkspur Quarry
        Hazelwood Sterling Velvet Windmill Cobalt Driftwood Ember Falcon Granite Ivory Kestrel
        Lantern Pinecrest
        """
    ),
    first_names=_words(
        """
        Oscar Wendy Felix Irene Hugo Bianca Leon Greta Ralph Tessa Edgar Mabel Conrad Yvonne Dexter
        Paula Stella Gavin Louisa Trevor Ingrid Boris Celia Nathan
        """
    ),
    last_names=_words(
        """
        Abbott Calloway Dunmore Everett Fairbank Goodwin Hartley Ingram Jessop Kendrick Lockwood
        Merrick Norwood Ogden Prescott Quinlan Rowland Sheldon Thornton Underhill Vance Whitaker
        Yardley Zeller
        """
    ),
    towns=_words(
        """
        Brookvale Tilbury Marston Wendover Hexford Appleby Dunwich Kelso Saltburn Thorpe Lynmouth
        Ravenglass Oxbridge Penrith Wickham Coldstream
        """
    ),
    streets=_words(
        "Elm Harbour Castle Willow Abbey Orchid Foundry Regent Tower Linden Canal Juniper Hill Dock"
    ),
    goods=_lines(
        """
        Cucumbers
        Rye bread
        Yogurt
        Lemonade
        Walnuts
        Black tea
        Onions
        Spinach
        Lentils
        Goat cheese
        Maple syrup
        Crayons
        Envelopes
        Desk lamp
        Scissors
        Hand cream
        Toothpaste
        Blanket
        Salmon
        Peaches
        Noodles
        Vinegar
        Cinnamon
        Carrots
        Napkins
        Screwdriver
        Flower pot
        Matches
        """
    ),
    departments=_words("Legal Archive Security Training Purchasing Quality Payroll Exports"),
    occupations=_words(
        "librarian mechanic butcher surgeon tailor jeweller florist chemist sailor editor actor vet"
    ),
    subjects=_lines(
        """
        Cleaning of the windows
        Your complaint in August
        Renewal of your contract
        Loss of a parcel
        Invitation to the museum
        Closing of the car park
        Test of the fire alarm
        Refund for two tickets
        Painting of the staircase
        Your visit in autumn
        """
    ),
    sentences=_lines(
        """
        It was kind of you to call us yesterday.
        A colleague has looked into the matter.
        The first results were better than planned.
        We enclose two pages with more details.
        Please let us know if this suits you.
        The lift will be out of order for a week.
        Nobody else needs to sign the list.
        We hope to see you again before winter.
        All prices include the usual taxes.
        """
    ),
    forms=_lines(
        """
        Parking Permit
        Course Enrolment
        Lost Property Report
        Gym Registration
        Donor Card
        Equipment Loan
        Pet Adoption
        """
    ),
    events=_lines(
        """
        Harvest Supper
        Poetry Night
        Bicycle Auction
        Pottery Workshop
        Kite Festival
        Quiz Evening
        Choir Rehearsal
        Model Train Show
        Baking Contest
        Moonlight Walk
        """
    ),
    venues=_lines(
        """
        Harbour Hall
        Castle Courtyard
        Rowing Club
        Windmill Barn
        Assembly Room
        Botanic House
        Juniper Pavilion
        Granary Rooms
        """
    ),
    series=_words("East West Adults Youth Indoor Outdoor Import Export Cats Dogs Online Retail"),
    categories={
        "town": _words("Oslo Vienna Lisbon Athens Dublin Prague Quito Hanoi Nairobi Zurich Havana"),
        "player": _words("Oscar Wendy Felix Irene Hugo Bianca Leon Greta Ralph Tessa Edgar Mabel"),
        "drink": _words("Tea Coffee Cocoa Milk Cider Soda Juice Water Punch"),
        "day": _words("Mon Tue Wed Thu Fri Sat Sun"),
        "season": tuple(str(year) for year in range(2008, 2026)),
    },
    themes=(
        Theme("Flights by town", "flights", "town"),
        Theme("Hotels by town", "hotels", "town"),
        Theme("Points won", "points", "player"),
        Theme("Laps finished", "laps", "player"),
        Theme("Drinks served", "cups", "drink"),
        Theme("Stock of drinks", "crates", "drink"),
        Theme("Calls by day", "calls", "day"),
        Theme("Parcels by day", "parcels", "day"),
        Theme("Tickets by season", "tickets", "season"),
        Theme("Snowfall by season", "cm", "season"),
    ),
)

VOCABULARY: dict[PageSplit, Vocabulary] = {"train": _TRAIN, "held_out": _HELD_OUT}

__all__ = ["VOCABULARY", "PageSplit", "Theme", "Vocabulary"]
