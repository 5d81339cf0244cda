/** The errors of the walker; a message names the file, field or text, and the cure. */

/** Base of every error that the walker raises on purpose. */
export class WalkerError extends Error {
  constructor(message) {
    super(message);
    this.name = this.constructor.name;
  }
}

/** A file of the bundle is missing, damaged, or contradicts the manifest. */
export class BadBundle extends WalkerError {}

/** The bundle or the setting needs something that this walker does not have; the message names it. */
export class NotSupported extends WalkerError {}

/** A setting is unknown or contradicts the bundle. */
export class BadSetting extends WalkerError {}

/** A text cannot be answered. */
export class BadInput extends WalkerError {}
