//! A setting: one JSON text, of limits or of schemas, that an operator can change while it is in use.
//!
//! The registry stores the text and does not interpret it. The code that does parses it once and caches
//! the result here, beside the text; a new text drops the cached value. So the path of a message never
//! parses, and sees a change the next time it reads the setting.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwapOption;

/// An optional text and the value made from it. Takes eight bytes until the first use.
#[derive(Default)]
pub struct JsonSetting(ArcSwapOption<SettingText>);

/// One version of the text, with its cached value.
#[derive(Default)]
struct SettingText {
    text: Option<Arc<str>>,
    made: OnceLock<Arc<dyn Any + Send + Sync>>,
}

impl JsonSetting {
    /// A setting with this text.
    pub(super) fn new(text: Option<&str>) -> Self {
        // Allocates nothing for an unset one: most are unset, and there may be millions.
        Self(ArcSwapOption::from(text.map(|text| new_setting_text(Some(text.into())))))
    }

    /// Whether there is a text.
    pub fn is_set(&self) -> bool {
        self.0.load().as_ref().is_some_and(|stated| stated.text.is_some())
    }

    /// The text, if it is set.
    pub fn text(&self) -> Option<Arc<str>> {
        self.0.load().as_ref()?.text.clone()
    }

    /// The value that `make` creates from the text, or from its absence. `make` is called once for each
    /// text and its result is cached until the text changes, so it may hold state too (a limit's
    /// account). Lock-free after the first call. Call again for each read of a socket: a caller that
    /// holds on to the result does not see changes.
    ///
    /// # Panics
    /// If `T` is not the type of the cached value: each setting has one reader.
    pub fn made<T: Send + Sync + 'static>(&self, make: impl FnOnce(Option<&str>) -> T) -> Arc<T> {
        if self.0.load().is_none() {
            // Another thread may have stored one meanwhile, or even a text: that one wins.
            self.0.compare_and_swap(&None::<Arc<SettingText>>, Some(new_setting_text(None)));
        }
        let stated = self.0.load();
        let stated = stated.as_ref().expect("once stored, it is only ever replaced");
        let made = stated.made.get_or_init(|| Arc::new(make(stated.text.as_deref())));
        Arc::clone(made).downcast().expect("each setting is made into one type")
    }

    /// Replaces or removes the text, and drops the value made from the old one.
    pub(super) fn set(&self, text: Option<&str>) {
        self.0.store(Some(new_setting_text(text.map(Arc::from))));
    }
}

fn new_setting_text(text: Option<Arc<str>>) -> Arc<SettingText> {
    Arc::new(SettingText { text, made: OnceLock::new() })
}

impl fmt::Debug for JsonSetting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Setting").field(&self.text()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_read_once_and_again_after_a_change() {
        let setting = JsonSetting::new(Some("1"));
        let parse = |text: Option<&str>| text.map(|text| text.parse::<u32>().expect("a number"));
        let first = setting.made(parse);
        assert_eq!(*first, Some(1));
        assert!(Arc::ptr_eq(&first, &setting.made(|_| -> Option<u32> { panic!("read twice") })));
        setting.set(Some("2"));
        assert_eq!(setting.text().as_deref(), Some("2"));
        assert_eq!(*setting.made(parse), Some(2));
        assert!(setting.is_set());
        setting.set(None);
        assert!(!setting.is_set() && !JsonSetting::default().is_set());
        assert_eq!(setting.text(), None);
        assert_eq!(*setting.made(parse), None);
        assert_eq!(*first, Some(1), "who holds the earlier one goes on with it");
    }

    #[test]
    fn what_is_made_of_no_text_is_kept_too() {
        let setting = JsonSetting::default();
        let first = setting.made(|text| text.map(str::len));
        assert_eq!(*first, None);
        assert!(Arc::ptr_eq(&first, &setting.made(|_| Some(0_usize))));
    }

    #[test]
    fn a_setting_that_is_not_set_costs_little() {
        assert_eq!(size_of::<JsonSetting>(), 8);
    }
}
