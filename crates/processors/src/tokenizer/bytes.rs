//! The alphabet of byte-level BPE: every byte as one printable character (GPT-2's `bytes_to_unicode`).

use std::collections::HashMap;
use std::sync::LazyLock;

/// Character of each byte.
static CHARS: LazyLock<[char; 256]> = LazyLock::new(|| {
    let mut next = 256;
    std::array::from_fn(|byte| match byte as u8 {
        printable @ (b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) => char::from(printable),
        _ => {
            next += 1;
            char::from_u32(next - 1).unwrap_or_default()
        }
    })
});

/// Byte of each character.
static BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    CHARS
        .iter()
        .enumerate()
        .map(|(byte, char)| (*char, byte as u8))
        .collect()
});

/// Bytes in the alphabet's spelling.
pub(super) fn spell(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| CHARS[usize::from(*byte)]).collect()
}

/// The bytes of a token: those it spells, or its own when it is not in the alphabet (added tokens).
pub(super) fn unspell(token: &str) -> Vec<u8> {
    token
        .chars()
        .map(|char| BYTES.get(&char).copied())
        .collect::<Option<Vec<_>>>()
        .unwrap_or_else(|| token.as_bytes().to_vec())
}

/// The byte that a SentencePiece byte token (`<0x0A>`) stands for.
pub(super) fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2)
        .then(|| u8::from_str_radix(hex, 16).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_is_a_bijection() {
        let all: Vec<u8> = (0..=255).collect();
        let spelled = spell(&all);
        assert_eq!(spelled.chars().count(), 256);
        assert_eq!(unspell(&spelled), all);
        assert_eq!(spell(b" \n"), "ĠĊ");
        assert_eq!(unspell("日"), "日".as_bytes());
    }

    #[test]
    fn byte_tokens() {
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0xA>"), None);
        assert_eq!(byte_token("<s>"), None);
    }
}
