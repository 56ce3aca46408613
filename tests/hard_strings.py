"""Strings on which tokenizers differ or break: what each line is for, stands before it."""

# ruff: noqa: RUF001 (letters that look like others are what is hard)
HARD_STRINGS = [
    # white space alone, before and after
    *("", "a", " ", "  ", "   ", "\n", "\n\n", " \n", "\n ", "\t", "\t\ta", "\r\n", "\r\n\r\n x"),
    *("Hello world", " Hello  world ", "hello   world", "end.  ", "\n\n  indented\n", "a \n b"),
    *(" leading", "trailing ", "  \n\n  x", "x\n\n\n", "x \t \n\t y", "\n\r\n\r"),
    *("a\r\rb", ";  \n"),
    # digits: runs, with and without spaces, of many scripts
    *("a  1", "a 1", "a1", "1a", " 1", "  1", "1  2", "12", "123", "1234", "1234567", "0" * 12),
    *("2024-10-31", "3.14159", "1,000,000", "x=10;", "v2.0.1", "0x1F", "10 000", "1\n2", "a\n\n1"),
    *("½ ² ①", "٣٤٥٦", "١٢٣ ٤٥٦٧", "Ⅷ", "１２３４", "४५६७", "๑๒๓๔", "𝟏𝟐𝟑𝟒", "x²³", "5½"),
    # contractions in all cases, and what looks like one
    *("don't", "DON'T", "Don'T", "we'll they've I'd it's", "WE'LL THEY'VE I'D IT'S", "We'Ll'rE'vE"),
    *("'tis", "rock'n'roll", "''''", "d'accord", "I'm I'M i'M", "it’s", "'s'S't'T", "a'lL", "'ſ"),
    *("he'Said", "we'LLive", "I'Most", "they'REal", "you'VEry", "'Tis 'Tx", "a'Dx"),
    "he'said we'llive",
    # case within words
    *("camelCaseWord", "HTTPServer", "eBay iPhone", "McDONALDs", "ÉCOLE École éCOLE"),
    "ǅungla aǅb ǅb",
    *("ßẞ", "İi", "ΑΒΓαβγΔε", "ПРИВЕТпривет", "ʰʲAʷb", "XMLHttpRequest2Go"),
    # code and punctuation
    *("def f(x):\n    return x**2  # 2\n", "\tif (a&&b) {\n\t\treturn;\n\t}", "a->b::c<d>"),
    *("#!/bin", "...", "---", "***", "!!!???", "$%^&*()", "http://a.b/c?d=e&f=1", "me@x.org"),
    *("C:\\dir\\1", "// x\n/// y\n", "a/\n/b", "(x);\ny", "</p>\n\n", "~/a//b"),
    *("=" * 40, "'\n\"\r\n"),
    # letters with marks, composed and not; other scripts
    *("naïve café", "nai\u0308ve cafe\u0301", "Straße", "ÅÄÖ", "A\u030aA\u0308"),
    "e\u0301\u0302\u0303",
    *("\u0301a", " \u0301", "1\u0301", "q\u0323\u0307 q\u0307\u0323", "\u1100\u1161\u11a8", "각"),
    *("\u212b\u2126", "ﬁ ﬂ", "Ǆ", "ſ", "𝒳𝔘", "Cửa Việt", "Привет, мир", "Ελληνικά"),
    *("שָׁלוֹם", "שלום"),
    *("مرحبا بالعالم", "नमस्ते दुनिया", "สวัสดีครับ", "កាន់តែពិសេស", "தமிழ்", "አማርኛ"),
    *("日本語のテキスト", "中文，标点。", "我想在apple工作1314151天～", "한국어 텍스트"),
    "ひらがなカタカナ",
    # emoji: skin tones, families, flags, keycaps
    *("😀", "😀😃", "👍🏽", "👨‍👩‍👧‍👦", "🇫🇷🇩🇪", "❤️", "1️⃣", "a😀b", " 😀", "é😀 é", "😶‍🌫️"),
    # spaces that are not spaces, and what is no space
    *("\u00a0", "a\u00a0b", "\u2003x", "\u200b", "a\u200db", "\ufeffx", "\u3000全角"),
    *("\u2028", "x\u2029y"),
    *("\x0b\x0c", "\x85", "a\x85b", "\u180e", "\u2060", "\u00ad"),
    # control characters, noncharacters, private use, right to left overrides
    *("\x00", "a\x00b", "\x00\x00", "\x04", "a\x04b", "\x1b[0m", "\x7f", "\ufffd"),
    *("\ufffe", "\ue000"),
    *("\U000e0041", "\U00040000", "\U0010ffff", "\u202eabc\u202c", "\u2067א\u2069"),
    # texts of special tokens, whole, in part, doubled
    *("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<repo_name>", "< |im_end| >"),
    *("<|im_end", "|>", "<|", "<<|im_end|>>", "<file_sep>1</file_sep>", "[INST] <<SYS>>"),
    *("<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "[/INST]", "<tool>", "<0x0A>"),
    # letters of the alphabets in which pieces are written
    *("Ġ", "Ġthe", "Ċ", "▁the", "â", "ĠĠ1", "Ã©"),
    # long repeats
    *("thethethe", "x" * 24, " " * 17, " " * 100 + "x", "\n" * 9, "a" * 65, "ab" * 33, "😀" * 9),
    *("A man, a plan: 7 canals.", "\t" * 12 + "x", "!" * 33, "é" * 20, "中" * 20, "A" * 33 + "b"),
]  # fmt: skip
