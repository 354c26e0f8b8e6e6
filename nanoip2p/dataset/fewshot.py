"""What a language model is told and shown before it is asked for an edit: the prompt and thirty examples.

Section 3.1.1 of the paper fine-tunes GPT-3 on 700 hand-written triplets. A chat model of today understands
the task from a page, and this is the page. The examples are ours. They differ in kind on purpose, because a
model repeats what it is shown: change some here, and the edits of the whole dataset follow.
"""

PROMPT = """\
You invent edits of pictures. You get the caption of a picture and answer with two short texts:

edit: an instruction, as a person would type it to someone who edits pictures for them. In the imperative, \
in plain words, twelve at most, and about one change only.
output: the caption of the picture after the edit. Keep every word of the first caption that the edit leaves \
true, and change only the rest.

The change must be visible in the picture: not a smell, a sound, a thought, or a story about it. It must \
suit this picture and yet not be the first that comes to mind. Vary the kind of edit: things, places, \
weather, season, time of day, age, era, material, colour, mood, art medium and style, something added, \
something taken away, something fantastic. If the caption is only a name or a title, take it for a picture \
of that. Nothing hateful, sexual or cruel."""

TRIPLETS = (  # input caption, instruction, output caption
    # time of day, season, weather
    ("A wooden pier on a quiet lake at noon", "make it a moonlit night",
     "A wooden pier on a quiet lake on a moonlit night"),
    ("Vineyards below a hill town in Umbria", "let it be deep winter",
     "Snow-covered vineyards below a hill town in Umbria in deep winter"),
    ("Portrait of a fisherman in a yellow raincoat", "have a storm break behind him",
     "Portrait of a fisherman in a yellow raincoat with a storm breaking behind him"),
    ("Street market in Hanoi", "add heavy fog", "Street market in Hanoi in heavy fog"),
    # something replaced, added, taken away
    ("A tabby cat asleep on a piano", "swap the cat for an otter", "An otter asleep on a piano"),
    ("Still life with lemons and a blue jug", "replace the lemons with seashells",
     "Still life with seashells and a blue jug"),
    ("Two hikers on a mountain ridge", "put a hot air balloon above them",
     "Two hikers on a mountain ridge with a hot air balloon above them"),
    ("A girl reading under an apple tree, oil painting", "give her a pair of fairy wings",
     "A girl with fairy wings reading under an apple tree, oil painting"),
    ("Harbour of Bergen with colourful houses and sailing boats", "remove the boats",
     "Harbour of Bergen with colourful houses and empty water"),
    ("Man with a beard and round glasses", "shave off his beard", "Clean-shaven man with round glasses"),
    # colour, material, number
    ("A vintage bicycle leaning on a brick wall", "paint the bicycle turquoise",
     "A turquoise vintage bicycle leaning on a brick wall"),
    ("Statue of a lion in front of the library", "carve the lion out of ice",
     "Ice statue of a lion in front of the library"),
    ("White running shoes, product photo", "knit them from wool",
     "White running shoes knitted from wool, product photo"),
    ("A snail on a mossy stone", "make the snail glow in neon colours",
     "A snail glowing in neon colours on a mossy stone"),
    ("A deer at the edge of the forest", "make it a whole herd", "A herd of deer at the edge of the forest"),
    # place, age, era
    ("A ballerina on stage", "move her to a subway station", "A ballerina in a subway station"),
    ("Lighthouse on the cliffs of Brittany by Anna Keller", "put the lighthouse on the moon",
     "Lighthouse on the surface of the moon by Anna Keller"),
    ("Portrait of a young violinist", "age him by fifty years", "Portrait of an old violinist"),
    ("The old mill by the river", "turn it into a ruin overgrown with ivy",
     "The ruin of the old mill by the river, overgrown with ivy"),
    ("Times Square with taxis and billboards", "take it back to the 1920s",
     "Times Square in the 1920s with old motor cars and painted signs"),
    ("A knight on horseback, medieval manuscript", "set it in the age of space travel",
     "An astronaut on a robot horse, medieval manuscript"),
    # mood, activity, clothes, light
    ("Children in a classroom", "make them all burst out laughing", "Children laughing in a classroom"),
    ("An empty hotel corridor", "make it look haunted", "A haunted hotel corridor with flickering lamps"),
    ("A panda sitting in bamboo", "let it play the saxophone",
     "A panda sitting in bamboo playing the saxophone"),
    ("Bride in a garden", "dress her as a pirate captain", "Bride dressed as a pirate captain in a garden"),
    ("Interior of a small bakery", "light it with candles only", "Interior of a small bakery lit by candles"),
    # medium and style
    ("Sunflowers in a field, photograph", "turn it into a stained glass window",
     "Sunflowers in a field, stained glass window"),
    ("A red fox in the snow", "draw it in charcoal", "A charcoal drawing of a red fox in the snow"),
    ("Skyline of Chicago", "in the manner of a Japanese woodblock print",
     "Skyline of Chicago, Japanese woodblock print"),
    ("Grandmother's kitchen", "build it out of toy bricks", "Grandmother's kitchen built out of toy bricks"),
)
