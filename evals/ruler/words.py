"""The stuff of prompts: RULER's noise, random keys and values, our own words and filler.

words.number(random.Random(0))  # "7380628"
words.key(random.Random(0))     # "golden-lantern"
"""

import random
import uuid

# RULER's noise (scripts/data/synthetic/niah.py), which is that of the passkey of Mohtashami and
# Jaggi (arXiv 2305.16300).
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

ADJECTIVES = """
able ample ancient angry arctic awake bare basic better bitter black bland blank blazing bleak
blind blonde blue blunt bold brave breezy brief bright brisk broad broken bronze brown bumpy busy
calm candid careful cheap cheerful chilly civil clean clear clever cloudy clumsy cold comic common
cool cosmic cozy crisp cruel curious curly curved damp dapper daring dark dear deep dense dim
direct distant dizzy double drowsy dry dull dusty eager early earnest eastern easy elastic elder
elegant empty equal even exact faint fair famous fancy fast feeble fierce fine firm first flat
foggy fond formal fragile frank free fresh frosty full funny fuzzy gentle giant giddy glad global
gloomy golden good grand grateful gray great green grim grumpy happy hardy harsh hasty heavy hidden
high hollow honest huge humble hungry icy ideal idle inner jolly jumpy keen kind lame large late
lazy lean light little lively local lonely long loose loud lovely low loyal lucky lunar mad major
mellow merry mighty mild minor misty mobile modern modest moist muddy mute narrow nasty native neat
nervous new nice nimble noble noisy normal northern odd old open orange outer oval pale patient
perfect plain pleasant polite poor prime private proper proud public pure purple quick quiet rapid
rare raw ready real red regal remote rich rigid ripe robust rosy rough round royal rural rusty sad
safe salty sandy scarce secret sharp short shy silent silly silver simple slender slim slow small
smart smooth snowy sober social soft solar solid sour southern spare spicy stale stark steady steep
stern stiff still stormy strange strict strong sturdy subtle sudden sunny super sweet swift tall
tame tart tender thick thin tidy tight tiny tired tough tranquil tricky true twin ugly unique upper
urban useful vague vain vast vivid warm wary weak western wet white whole wide wild windy wise
witty wooden worthy young zealous
""".split()  # noqa: SIM905

NOUNS = """
acorn actor alley amber anchor angel ankle anthem apple apron arch arena arrow atlas attic autumn
badge bakery ballad bamboo banner barn barrel basin basket beach beacon beaver bell bench berry
bicycle birch bishop blanket blossom boat bonnet book boot border bottle boulder bowl branch brass
bread brick bridge broom brush bucket bugle butter button cabin cable cactus camel camera canal
candle canoe canvas canyon captain carbon cargo carpet carrot cart castle cattle cave cedar cellar
chain chair chalk channel chapel cherry chest chimney church cider circle citrus clay cliff clock
cloth cloud clover coast coat cobalt coffee collar comet compass copper coral corner cottage cotton
couch cradle crane crater cricket crown crystal curtain cushion daisy dancer dawn delta desert desk
diamond dinner doctor dolphin donkey door dragon drawer drum eagle earth easel echo elbow elm ember
engine estate evening fabric falcon farm farmer feather fence fern ferry fiddle field finch finger
fire flag flame flask flint flock flood flower flute forest forge fork fossil fountain fox frame
galaxy garden garlic gate gazelle geyser ginger glacier glass globe glove goat goose grain grape
gravel guitar gull hamlet hammer hammock harbor harp hat hawk hazel heart hedge helmet hill hockey
honey horn horse hotel house iceberg igloo indigo ink inlet iris iron island ivory ivy jacket jade
jar jasmine jewel jigsaw journal jungle juniper kayak kettle kitchen kite kitten knight ladder
lagoon lake lamp lantern lark lasso laurel lava lawyer leaf leather lemon lens letter library lily
lime linen lion lizard lobster locket lodge lotus lumber magnet mango mantle maple marble market
marsh mask meadow medal melon metal meteor mill mint mirror mitten monk moon moose morning mosaic
moss mountain museum needle nest nickel north notebook oak oasis oat ocean olive onion opal orchard
organ otter oven owl oyster paddle palace panda paper parade parcel park parrot pasture path peach
pearl pebble pencil pepper piano picnic pigeon pillow pilot pine planet plateau plaza plow plum
pocket poet pond pony poplar porch potato prairie prism pumpkin puppet puzzle quarry quartz quill
rabbit radish raft rain ranch raven ribbon ridge river road robin rocket root rope rose ruby saddle
sailor salad salmon sandal satin saucer scarf school scooter sea shadow sheep shell ship shore silk
singer sketch sleigh slope snow sparrow spice spider spoon spring spruce square stable star statue
stone storm stove straw stream sugar summer sunset swan table tailor teacher temple tent thistle
thunder ticket tiger timber tower town trail train tulip tunnel turtle umbrella valley vase velvet
vessel village vine violet violin wagon walnut walrus water wheat wheel whistle willow window
winter wolf wool yacht yard zebra zephyr
""".split()  # noqa: SIM905

CONSONANTS, VOWELS = "bdfhjklmnprstvwy", "aeiou"
PLAIN = len(CONSONANTS) ** 3 * len(VOWELS) ** 2  # 102,400

PATTERNS = (
    "The {a} {n} stood beside the {m} until the {o} came.",
    "Nobody in the {n} had seen that {a} {m} before.",
    "Most people think of any {n} as {a}, but the {m} near the {o} was not.",
    "Every {m} is worth more than some {n} when the {o} is {a}.",
    "They carried the {n} past the {m} and left it by the {a} {o}.",
    "If you build your own {n}, begin with the {m}.",
    "That was one {a} year for the {n}, and the {m} paid for it.",
    "She said that the {o} had always been {a}.",
    "What matters about the {n} is how {a} the {m} behind it remains, even without its {o}.",
    "We walked from the {n} to the {m}.",
)


def number(draw: random.Random, digits: int = 7) -> str:
    """A number of so many digits; RULER's have seven."""
    return str(draw.randrange(10 ** (digits - 1), 10**digits))


def identifier(draw: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def key(draw: random.Random) -> str:
    """An adjective and a noun, as RULER's "words"."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def plain(draw: random.Random) -> str:
    """A word that can be spoken, as "mirot": one of PLAIN, none of which is part of another."""
    one, two, three = draw.choices(CONSONANTS, k=3)
    return one + draw.choice(VOWELS) + two + draw.choice(VOWELS) + three


def filler(count: int) -> list[str]:
    """At least `count` words of sentences that say nothing; the same beginning for any count.

    It has no digit and no hyphen, so neither a key nor a value.
    """
    draw = random.Random("filler")
    words = []
    while len(words) < count:
        n, m, o = draw.sample(NOUNS, 3)
        sentence = draw.choice(PATTERNS).format(a=draw.choice(ADJECTIVES), n=n, m=m, o=o)
        words += sentence.split()
    return words
