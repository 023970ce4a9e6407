# ruff: noqa: RUF001 (typographic signs are what some of the texts are about)
"""Record `captions.json.gz`: what the official COCO caption evaluation gives for generated texts. Needs Java.

    python tests/golden/record_captions.py [FOLDER]

FOLDER holds pycocoevalcap, where it is not installed. Half of the texts are as COCO's captions are, the others hold
what is hard to tokenise. Recorded are the tokens of each text, where the texts are the lines of one input, and the
scores of sets of pictures with five references and an answer each, cut from the same texts.
"""

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

SEED = 20150401
NUM_PLAIN, NUM_HARD = 3000, 2100

WHO = """
    man woman person boy girl child kid baby dog cat horse cow sheep elephant giraffe zebra bear bird surfer skier
    snowboarder skateboarder batter pitcher umpire catcher policeman chef toddler couple crowd player cowboy
    driver
""".split()
MANY = """
    people men women children kids dogs cats horses cows sheep elephants giraffes zebras birds surfers skiers
    players tourists teddy bears girls boys friends students soldiers passengers
""".split()
THING = """
    frisbee skateboard surfboard umbrella kite laptop keyboard remote phone pizza sandwich hot-dog donut cake
    banana apple orange carrot bowl cup fork knife spoon bottle wine-glass bench chair couch bed toilet sink
    refrigerator oven microwave toaster clock vase book scissors hair-dryer toothbrush stop sign parking meter
    traffic light fire hydrant train bus truck boat airplane motorcycle bicycle backpack suitcase tie handbag
    t-shirt baseball bat glove racket snowboard TV teddy bear Wii controller 747 double-decker bus T-ball stand
""".split()
LOOK = """
    red blue green yellow white black brown large small big little old young wooden metal stuffed long-haired
    black-and-white half-eaten two-story well-dressed brightly-colored 3-tiered multi-colored empty crowded sunny
    snow-covered grassy striped antique dirty clean ornate open-faced 5-year-old
""".split()
DOING = """
    sitting standing riding holding eating walking running jumping playing looking flying lying grazing parked
    posing smiling sleeping skiing surfing talking hitting catching throwing cutting preparing reaching laying
    waiting
""".split()
WHERE = """
    street beach field kitchen bathroom park table road sidewalk mountain ocean room grass fence water snow hill
    restaurant tennis court baseball field train station airport counter desk wall tree building sky window
""".split()
HOW = "on in near next to behind under beside over across through by inside above along against at".split()
NAMES = """
    John's Mary's New York U.S. St. Louis Dr. Seuss Mr. Potato Washington D.C. London's McDonald's Dunkin' Donuts
    Coca-Cola AT&T M&M's Wal-Mart Starbucks 'STOP' "ONE WAY" No. 7 5th Ave. Macy's Levi's L.A. O'Hare Jr. USA
""".split()
EXTRA = """
    . , ; : - -- ! ? ... it's isn't don't can't they're he's there's that's doesn't aren't won't cannot 2 3 10 two
    three 50% 1/2 3:30 12:05 p.m. a.m. 1980's 1950s 8x10 and/or w/ man's dogs' women's & (left) [sic] "hello" 'hi'
    girl's 6' 12" $5 #1 @ etc. e.g. i.e. vs. 24/7 9/11 1st 2nd 3rd 20th o'clock 'em rock'n'roll n' y'all let's its
""".split()

HARD = """
    can't won't isn't DON'T shouldn't've could've he'll she'd I'm we're y'all 'tis 'twas 'em 'til 'cause o'clock
    ma'am o'er ne'er rock'n'roll fish'n'chips d'Orsay l'eau c'est O'Brien's gonna gotta gimme cannot wanna lemme
    Cannot dogs' James' kid's 80's '80s 1980's 1980s '07 mid-1990's t-shirt T-shirts well-known mother-in-law
    5-year-old X-ray e-mail and/or he/she w/o 1/2 3/4 3-1/2 24/7 9/11/2001 12-25-10 km/h black/white/red a/b/c/d
    Mr. Mrs. Dr. St. Jr. vs. etc. e.g. i.e. a.m. p.m. U.S. U.S.A. u.k. Ph.D. D.C. J.K. Inc. Corp. Ltd. Ave. Blvd.
    No. no. fig. dept. approx. ft. lbs. oz. in. Mass. Wash. wash. miss. B. C. x. I. a. $5 $5.00 US$20 5$ £5 €10 5€
    ¥500 25¢ $1,000,000 50% 100% 1,000 1,000.5 3.14 .5 -5 +5 3:30 12:00pm 10am 5:30-6:30 5x7 8x10 5'x7' 6'2" 12"
    5ft 10lb 3rd 21st #1 #tag @user me@site.com www.site.com http://site.org/a_b?c=1 https://x.net/ site.com
    photo.jpg v1.2.3 AT&T R&B M&M's B&B Q&A bed&breakfast &amp; &lt; &quot; "quoted" 'single' ``tex'' “smart”
    ‘curly’ it’s don’t man’s «guillemets» (parens) [square] {curly} (s) dog(s) <b> </b> <3 < > = + * ** ^ ~ | \\ /
    _ __ a_b snake_case_name ! !! !!! ? ?? ?! !? . .. ... .... , ,, ; : - -- --- ---- – — … word... ...word what?!
    no!! stop. stop, stop; stop: stop! "stop". (stop). stop.) a--b a—b 1990–2000 5–6 x - y :) :-) :( ;) :D :P =)
    :/ 8) <3 ^_^ café naïve piñata façade Zürich résumé’s 東京 日本語 Москва ½ 1½ ¼ ° 90° 5°C ™ ® © • ● → ✓ × € 😀 🚲
    ❤ ☺ hello,world hello.World end.Start one.two yes/no... A.B. A.B.C J. R. Smith x.y Yahoo! wow!yes why?no 50-50
    7-Eleven 4x4 F-16 B-52s 747-400 A-10 7-up 3D 3-D HD-TV WiFi iPhone6 PS3 Xbox360 n' ol' 'n' -word word- a- -b
    l'été d'Été 555-1234 1-800-555-1234 (555) 1.5-inch 1,000-lb half-way co-op co.-op. O.K. o.k. OK. :30 5: #5 # @
    @5 5# %5 & && @home * *bold* _em_ ~5 a.k.a. aka A+ B- C++ C# .NET hip-hop so-called semi- -ish ice-cream- tie-
    'n salt'n more'n
""".split()
STARTS = "A The Two There This An It He She When In At Man Woman Close Black".split()


def plain(rng: random.Random) -> str:
    """Make a caption as COCO's are: mostly words, some with what people type around them."""
    words = [rng.choice(STARTS if rng.random() < 0.9 else WHO)]
    for _ in range(rng.choice([1, 1, 1, 2])):
        if rng.random() < 0.6:
            words.append(rng.choice(LOOK))
        words.append(rng.choice(rng.choice([WHO, MANY, THING])))
        words += [rng.choice(DOING), rng.choice(HOW), rng.choice(["a", "the", "some", "his", "their"])]
        if rng.random() < 0.3:
            words.append(rng.choice(LOOK))
        words.append(rng.choice(rng.choice([WHERE, THING])))
        if rng.random() < 0.25:
            words.insert(rng.randrange(1, len(words)), rng.choice(NAMES + EXTRA))
    if rng.random() < 0.2:
        at = rng.randrange(len(words))
        words[at] += rng.choice([",", ".", ";", "'s", "!", "-"])
    text = " ".join(words) + rng.choice(["", ".", ".", ".", " .", ". ", "!", "..."])
    return rng.choice([text, text, text, text.lower(), text.upper() if rng.random() < 0.2 else text])


def hard(rng: random.Random) -> str:
    """Make a text from what is hard to tokenise, some of it put together without a space."""
    text = rng.choice(["", "A ", "the "])
    for _ in range(rng.randint(1, 6)):
        text += rng.choice(HARD if rng.random() < 0.7 else WHO + WHERE + STARTS)
        text += rng.choice([" "] * 12 + ["  ", "", ",", ". ", ".", "'s ", "/"])
    return text


def generated(num: int, make: Callable[[random.Random], str], rng: random.Random) -> list[str]:
    """Make so many different texts, and a few empty ones."""
    texts = [make(rng) for _ in range(num)]
    for at in (num // 3, num // 2):
        texts[at] = ""
    return texts


def scores(references: list[list[str]], answers: list[str]) -> dict[str, object]:
    """Compute what COCOEvalCap does, without SPICE: the tokenizer, then each scorer."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    gts = {i: [{"caption": text} for text in texts] for i, texts in enumerate(references)}
    res = {i: [{"caption": text}] for i, text in enumerate(answers)}
    gts, res = PTBTokenizer().tokenize(gts), PTBTokenizer().tokenize(res)
    cider, by_row = Cider().compute_score(gts, res)
    bleu = Bleu(4).compute_score(gts, res, verbose=0)[0]
    rouge, meteor = Rouge().compute_score(gts, res)[0], Meteor().compute_score(gts, res)[0]
    return {"cider": float(cider), "by_row": list(map(float, by_row)), "bleu": list(map(float, bleu))} | {
        "rouge_l": float(rouge),
        "meteor": meteor,
    }


def tokens_of(texts: list[str]) -> list[str]:
    """Tokenise the texts as lines of one input."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({0: [{"caption": text} for text in texts]})[0]


def cut(texts: list[str], start: int, num: int, rng: random.Random) -> dict[str, object]:
    """Cut a set of pictures from the texts: six to each; most answers are a reference, changed in a word or two."""
    references = [texts[start + 6 * i : start + 6 * i + 5] for i in range(num)]
    answers = []
    for i in range(num):
        words = rng.choice(references[i]).split()
        for _ in range(rng.choice([0, 1, 2, 4])):
            if words:
                words[rng.randrange(len(words))] = rng.choice(WHO + WHERE)
        answers.append(" ".join(words) if rng.random() < 0.9 else texts[start + 6 * i + 5])
    return {"start": start, "answers": answers} | scores(references, answers)


def main() -> None:
    """Write the file next to this script."""
    sys.path[:0] = sys.argv[1:]
    rng = random.Random(SEED)
    texts = generated(NUM_PLAIN, plain, rng) + generated(NUM_HARD, hard, rng)
    sets = [cut(texts, start, num, rng) for start, num in ((0, 300), (1800, 100), (2400, 1), (NUM_PLAIN, 80))]
    record = {"num_plain": NUM_PLAIN, "texts": texts, "tokens": tokens_of(texts), "sets": sets}
    data = json.dumps(record, ensure_ascii=False).encode()
    (Path(__file__).parent / "captions.json.gz").write_bytes(gzip.compress(data, 9, mtime=0))


if __name__ == "__main__":
    main()
