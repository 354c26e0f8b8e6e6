"""How people word an edit of the nano world: phrasings, synonyms, misspellings, missing articles."""

import random
import re

HELD_OUT = 2  # training never uses the last two phrasings of a kind, which test new phrasings
# Templates of the instructions, twelve for each kind of edit. Each word of the held-out phrasings is also in
# another one, because a text encoder has to be trained on a word to understand it.
PHRASINGS = {
    "recolour": (
        "make the {old} {new}", "paint the {old} {new}", "turn the {old} {new}",
        "change the color of the {old} to {new}", "could you paint the {old} {new} please?",
        "make {old} {new}", "color the {old} {new}", "I want the {old} to be {new}",
        "the {old} should be {new}", "please change the {old}'s color to {new}",
        "can you make the {old} {new}, please?", "change the {old} to {new}"),
    "replace": (
        "replace the {old} with a {new}", "turn the {old} into a {new}", "swap the {old} for a {new}",
        "change the {old} into a {new}", "could you turn the {old} into a {new} please?",
        "put a {new} where the {old} is", "I want a {new} instead of the {old}",
        "make a {new} out of the {old}", "there should be a {new} instead of the {old}",
        "please replace the {old} by a {new}",
        "can you swap the {old} for a {new}, please?", "make the {old} into a {new}"),
    "add": (
        "add {new} {where}", "put {new} {where}", "place {new} {where}", "{where}, add {new}",
        "could you add {new} {where} please?", "I want {new} {where}", "there should be {new} {where}",
        "draw {new} {where}", "please put {new} {where}", "let there be {new} {where}",
        "can you place {new} {where}, please?", "{where}, put {new}"),
    "remove": (
        "remove the {old}", "delete the {old}", "take away the {old}", "erase the {old}",
        "can you remove the {old} please?", "get rid of the {old}", "I don't want the {old}",
        "there should be no {old}", "please make the {old} disappear", "let the {old} disappear",
        "could you delete the {old}, please?", "take the {old} away"),
    "time": (
        "make it {new}", "change it to {new}", "turn the {old} into {new}", "set the time to {new}",
        "can you make it {new} please?", "I want it to be {new}", "it should be {new}", "let it be {new}",
        "please turn it into {new}", "change {old} into {new}",
        "could you change it to {new}, please?", "change the {old} to {new}"),
    "weather": (
        "make it {new}", "make the weather {new}", "change the weather to {new}", "turn it {new}",
        "can you make it {new} please?", "I want {new} weather", "the weather should be {new}",
        "let the weather be {new}", "please change the weather to {new}", "it should be {new}",
        "could you turn it {new}, please?", "set the weather to {new}"),
    "ground": (
        "turn the ground into {new}", "replace the {old} with {new}", "cover the ground with {new}",
        "make the ground {new}", "could you cover the ground with {new} please?",
        "I want {new} on the ground", "the ground should be {new}", "put {new} on the ground",
        "please turn the ground into {new}", "there should be {new} instead of the {old}",
        "can you make the ground {new}, please?", "change the ground to {new}"),
}
SYNONYMS = {
    "house": ("home", "cottage"), "tree": ("oak", "fir"), "car": ("automobile", "vehicle"),
    "tent": ("teepee", "wigwam"), "mushroom": ("toadstool", "fungus"), "flower": ("blossom", "bloom"),
    "rocket": ("spaceship", "spacecraft"), "balloon": ("hot air balloon", "airship"),
    "purple": ("violet",), "color": ("colour",), "middle": ("center", "centre"),
    "day": ("daytime",), "sunset": ("dusk", "evening"), "night": ("nighttime",),
    "clear": ("sunny",), "cloudy": ("overcast",), "rainy": ("wet",), "foggy": ("misty",),
    "grass": ("lawn",), "dirt": ("soil", "earth"),
}
MISSPELLINGS = {
    "house": ("hosue", "houes"), "tree": ("tre", "treee"), "car": ("carr", "cra"), "tent": ("tennt", "tnet"),
    "mushroom": ("mushrom", "mushroon"), "flower": ("flowr", "flwoer"), "rocket": ("roket", "rokcet"),
    "balloon": ("baloon", "ballon"), "red": ("redd",), "orange": ("oragne", "ornge"), "yellow": ("yelow",),
    "green": ("gren", "grean"), "blue": ("bleu", "bule"), "purple": ("purpel", "pruple"), "pink": ("pnik",),
    "white": ("wite", "whtie"), "sunset": ("sunst",), "night": ("nite", "nigth"), "clear": ("cleer",),
    "cloudy": ("cloudly", "cluody"), "rainy": ("rainny",), "foggy": ("fogy",), "grass": ("gras",),
    "sand": ("snad",), "snow": ("snwo",), "dirt": ("drit",), "replace": ("replcae",), "remove": ("remvoe",),
    "change": ("chnage",), "please": ("plese",),
}


def reword(text: str, rng: random.Random) -> str:
    """`text` with some words replaced by synonyms or misspellings, and sometimes without its articles."""
    def other(match: re.Match) -> str:
        for table, odds in ((SYNONYMS, 0.3), (MISSPELLINGS, 0.1)):
            if match[0] in table and rng.random() < odds:
                return table[match[0]][int(rng.random() * len(table[match[0]]))]
        return match[0]

    text = re.sub(r"\w+", other, text)
    if rng.random() < 0.15:
        text = re.sub(r"\b(the|an?) ", "", text)
    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\ban (?=[^aeiou])", "a ", text))
