// A byte-level BPE tokenizer of a tokenizer.json, as the model has one. `layer.json` holds ids of the library's own, which
// the page compares before it shows any.

const PIECES =
  /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/gu;

/** The printable character that stands for each byte. */
function byteCharacters() {
  const printable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
}

export class Tokenizer {
  /** `json` is the content of a tokenizer.json; throws where it needs more than this file knows. */
  constructor(json) {
    const { model, normalizer, pre_tokenizer: before, post_processor: after, added_tokens: added } = json;
    const known = model.type === "BPE" && !model.byte_fallback && !model.ignore_merges && !model.continuing_subword_prefix;
    const plain = normalizer === null && after === null && added.length === 0;
    const bytes = before?.type === "ByteLevel" && before.use_regex && !before.add_prefix_space;
    if (!known || !plain || !bytes) throw new Error("this page tokenises with plain byte-level BPE only");
    this.vocab = model.vocab;
    const pair = (merge) => (typeof merge === "string" ? merge : merge.join(" "));
    this.ranks = new Map(model.merges.map((merge, rank) => [pair(merge), rank]));
    this.characters = byteCharacters();
    this.bytes = new Map(this.characters.map((character, byte) => [character, byte]));
    this.pieces = Object.entries(model.vocab).reduce((all, [piece, id]) => ((all[id] = piece), all), []);
  }

  /** Ids of a text. */
  encode(text) {
    const encoder = new TextEncoder();
    return (text.match(PIECES) ?? []).flatMap((piece) => {
      const symbols = this.merge([...encoder.encode(piece)].map((byte) => this.characters[byte]));
      return symbols.map((symbol) => {
        if (!(symbol in this.vocab)) throw new Error(`the vocabulary has no ${symbol}`);
        return this.vocab[symbol];
      });
    });
  }

  /** Joins the pair that was learned first, until none is left. */
  merge(symbols) {
    for (;;) {
      let [best, at] = [Infinity, -1];
      for (let i = 0; i + 1 < symbols.length; i++) {
        const rank = this.ranks.get(`${symbols[i]} ${symbols[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) return symbols;
      symbols.splice(at, 2, symbols[at] + symbols[at + 1]);
    }
  }

  /** A token as a reader sees it: blanks and line ends made visible, part of a character as its bytes. */
  label(id) {
    const bytes = Uint8Array.from([...this.pieces[id]].map((character) => this.bytes.get(character)));
    const hex = () => [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join(" ");
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      return text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || hex();
    } catch {
      return hex();
    }
  }
}
