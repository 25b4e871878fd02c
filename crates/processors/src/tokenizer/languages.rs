//! Languages of translation models: their codes, their tokens, and what stands around a text in each.

use tokenizers::PostProcessorWrapper;

use super::Tokenizer;
use super::assemble::Place::{First, Second, Token};
use super::assemble::{self, Slot};
use super::config::TokenizerConfig;
use super::family::Family;
use crate::{Error, Result};

/// mBART's, in the order of their ids.
const MBART: &str = "ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV \
    my_MM ne_NP nl_XX ro_RO ru_RU si_LK tr_TR vi_VN zh_CN";

/// What mBART-50 has beyond these.
const MBART50: &str = "af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX \
    sv_SE sw_KE ta_IN te_IN th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI";

/// NLLB's.
const NLLB: &str = "ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab \
    ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn \
    ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl \
    cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn \
    dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn pes_Arab fij_Latn fin_Latn \
    fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn \
    heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn \
    jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor knc_Arab knc_Latn \
    kaz_Cyrl kbp_Latn kea_Latn khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kon_Latn kor_Hang kmr_Latn \
    lao_Laoo lvs_Latn lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn ltg_Latn ltz_Latn lua_Latn lug_Latn \
    luo_Latn lus_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Latn mkd_Cyrl plt_Latn mlt_Latn mni_Beng \
    khk_Cyrl mos_Latn mri_Latn zsm_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nso_Latn nus_Latn \
    nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pol_Latn por_Latn prs_Arab pbt_Arab \
    quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn \
    slv_Latn smo_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn \
    sun_Latn swe_Latn swh_Latn szl_Latn tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi \
    taq_Latn taq_Tfng tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab \
    ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn \
    yue_Hant zho_Hans zho_Hant zul_Latn";

/// M2M-100's.
const M2M100: &str = "af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi \
    hr ht hu hy id ig ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns \
    oc or pa pl ps pt ro ru sd si sk sl so sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh \
    zu";

/// Those of the models for WMT 2021.
const WMT21: &str = "en ha is ja cs ru zh de";

/// Codes of the languages that models of this kind know, in the order of their ids.
pub(super) fn codes(config: &TokenizerConfig) -> Vec<&'static str> {
    let variant = config
        .setting("language_codes")
        .and_then(serde_json::Value::as_str);
    let lists: &[&'static str] = match config.family {
        Family::MBart => &[MBART],
        Family::MBart50 => &[MBART, MBART50],
        Family::Nllb => &[NLLB],
        Family::M2M100 if variant == Some("wmt21") => &[WMT21],
        Family::M2M100 => &[M2M100],
        Family::PLBart if variant == Some("multi") => &["java python en_XX javascript php ruby go"],
        Family::PLBart => &["java python en_XX"],
        _ => &[],
    };
    lists.iter().flat_map(|list| list.split_whitespace()).collect()
}

/// The token of a language.
pub(super) fn token(family: Family, code: &str) -> String {
    match family {
        Family::M2M100 | Family::PLBart if !code.starts_with("__") => format!("__{code}__"),
        _ => code.to_owned(),
    }
}

/// The token of the language that texts are in, unless told otherwise.
pub(super) fn source(config: &TokenizerConfig) -> Option<String> {
    let default = match config.family {
        Family::MBart | Family::MBart50 => Some("en_XX"),
        Family::Nllb => Some("eng_Latn"),
        Family::M2M100 => Some("en"),
        Family::PLBart
            if config
                .setting("language_codes")
                .is_some_and(|codes| codes == "multi") =>
        {
            Some("en_XX")
        }
        _ => None,
    };
    let given = config.setting("src_lang").and_then(serde_json::Value::as_str);
    given.or(default).map(|code| token(config.family, code))
}

/// What stands around texts in a language, given by its token.
pub(super) fn around(
    file: &str,
    config: &TokenizerConfig,
    language: Option<&str>,
    id: impl Fn(&str) -> Option<u32>,
) -> Result<PostProcessorWrapper> {
    let eos = config.special_tokens.get("eos_token");
    let eos =
        eos.ok_or_else(|| Error::format(file, "there is no eos_token; name it in tokenizer_config.json"))?;
    // The oldest models have the language behind the text.
    let behind = match config.family {
        Family::MBart | Family::PLBart => true,
        Family::Nllb => config.flag("legacy_behaviour").unwrap_or(false),
        _ => false,
    };
    let language: Option<Slot<'_>> = language.map(|token| (Token(token), 0));
    let whole = |texts: &[Slot<'static>]| -> Vec<Slot<'_>> {
        let (before, after) = match behind {
            true => (None, language),
            false => (language, None),
        };
        before
            .into_iter()
            .chain(texts.iter().copied())
            .chain([(Token(eos), 0)])
            .chain(after)
            .collect()
    };
    assemble::template(
        file,
        &whole(&[(First, 0)]),
        &whole(&[(First, 0), (Second, 0)]),
        id,
    )
}

impl Tokenizer {
    /// Codes of the languages that the model translates, empty for other models.
    pub fn languages(&self) -> Vec<&'static str> {
        let config = self.config();
        let mut codes = codes(config);
        codes.retain(|code| self.token_to_id(&token(config.family, code)).is_some());
        codes
    }

    /// The id of a language's token: what a translation into it has to begin with (`forced_bos_token_id`).
    ///
    /// # Errors
    /// [`Error::NoLanguage`] when the model does not know the language.
    pub fn lang_id(&self, lang: &str) -> Result<u32> {
        self.token_to_id(&self.language(lang)?)
            .ok_or_else(|| self.no_language(lang))
    }

    /// This tokenizer for texts in a language that is to be translated: Python's `src_lang`.
    ///
    /// # Errors
    /// [`Error::NoLanguage`] when the model does not know the language.
    pub fn with_src_lang(&self, lang: &str) -> Result<Self> {
        let language = self.language(lang)?;
        let around = around("the tokenizer", self.config(), Some(&language), |token| {
            self.token_to_id(token)
        })?;
        Ok(Self {
            around: std::sync::Arc::new(Some(around)),
            ..self.clone()
        })
    }

    /// The tokenizer for what a model shall write (its labels), in a language if it translates: Python's
    /// `text_target`. Most models have one for both sides; Marian has a vocabulary of its own.
    ///
    /// # Errors
    /// [`Error::NoLanguage`] when the model does not know the language.
    pub fn for_target(&self, lang: Option<&str>) -> Result<Self> {
        match (&self.inner.target, lang) {
            (Some(target), _) => Ok(target.clone()),
            (None, Some(lang)) => self.with_src_lang(lang),
            (None, None) => Ok(self.clone()),
        }
    }

    /// The token of a language that the model knows.
    fn language(&self, lang: &str) -> Result<String> {
        let config = self.config();
        let token = token(config.family, lang);
        let known = codes(config)
            .into_iter()
            .any(|code| self::token(config.family, code) == token);
        match known {
            true => Ok(token),
            false => Err(self.no_language(lang)),
        }
    }

    fn no_language(&self, lang: &str) -> Error {
        Error::NoLanguage {
            lang: lang.to_owned(),
            known: match self.languages() {
                none if none.is_empty() => "none".to_owned(),
                some => some.join(", "),
            },
        }
    }
}
